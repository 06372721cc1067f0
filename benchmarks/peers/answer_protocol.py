"""How `steno bench --peer` talks to a worker: JSON lines, a request on stdin, an answer on stdout, until stdin ends.

    {"model": folder, "dtype": "float32", "threads": 1}                         -> {"versions", "methods"}
    {"method": "snapkv", "share": 0.25, "tokens": [ids]}                         -> what reading them cost
    {"given": [ids], "end_tokens", "forced": [ids] or null, "passes": [1, 1, …], "logprobs": file}
                                                                                 -> what was decoded after them

The worker holds the last text that it read; each decoding starts from there. It sees token ids alone, so that the
tokenizer, the template and the scoring are the same for all. An error is answered as `{"error": words}`.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from held import held_bytes
from transformers import AutoModelForCausalLM


@dataclass(frozen=True, kw_only=True)
class Held:
    """A text that was read. num_tokens: its length, whatever is held of it. working_bytes: of one layer made dense to be used."""

    cache: Any
    num_tokens: int
    prefill_s: float
    compress_s: float
    kv_bytes_peak: int
    working_bytes: int = 0


Read = Callable[[Any, torch.Tensor, float | None], Held]
"""Reads token ids `[1, S]` with a model and keeps a share of them, None where the method takes none."""


def dense_bytes(model: Any, num_tokens: int, layers: int | None = None) -> int:
    """Of a dense cache of all layers, or of some, in the model's dtype."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    count = config.num_hidden_layers if layers is None else layers
    return int(2 * count * config.num_key_value_heads * head_dim * model.dtype.itemsize * num_tokens)


def fork(cache: Any) -> Any:
    """A cache that grows on its own: an update puts new tensors into a layer and leaves the old ones as they are."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def decode(model: Any, held: Held, request: dict[str, Any]) -> dict[str, Any]:
    """Greedy steps after the given tokens, or the forced ones; log-probabilities `[n, V]` fp32 go to a file.

    Each pass is behind as many tokens as the request says, more than one only where they are forced. Seconds are those of
    passes behind one token, null of others.
    """
    cache, position, feed = fork(held.cache), held.num_tokens, request["given"]
    forced, ends = request["forced"], frozenset(request["end_tokens"])
    made: list[int] = []
    seconds, logprobs = [], []
    for count in request["passes"]:
        wanted = forced[len(made) : len(made) + count] if forced else []
        inputs, behind = feed + wanted[:-1], max(1, len(wanted))
        started = time.perf_counter()
        out = model(
            input_ids=torch.tensor([inputs]),
            past_key_values=cache,
            position_ids=torch.arange(position, position + len(inputs))[None],
            use_cache=True,
            logits_to_keep=behind,
        )
        logprob = out.logits[0, -behind:].float().log_softmax(-1)
        tokens = wanted or [int(logprob[0].argmax())]
        seconds.append(time.perf_counter() - started if behind == 1 else None)
        logprobs.append(logprob)
        position += len(inputs)
        made, feed = made + tokens, tokens[-1:]
        if len(made) == len(forced) if forced else tokens[0] in ends:
            break
    np.save(request["logprobs"], torch.cat(logprobs).numpy())
    kv_bytes = held_bytes(cache)
    return {
        "token_ids": made,
        "seconds": seconds,
        "kv_bytes": kv_bytes,
        "kv_bytes_peak": max(held.kv_bytes_peak, kv_bytes + held.working_bytes),
    }


def serve(methods: Mapping[str, Read], packages: Sequence[str]) -> None:
    """The main function of a worker. packages: those whose versions matter; what is not there fails when it is used."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print where they like; standard output is for the answers
    start = json.loads(sys.stdin.readline())
    torch.set_num_threads(start["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        start["model"], dtype=getattr(torch, start["dtype"]), attn_implementation="sdpa"
    ).eval()
    _reply(
        replies,
        {"versions": {name: found for name in packages if (found := installed(name))}, "methods": sorted(methods)},
    )
    held: Held | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            with torch.inference_mode():
                if "method" in request:
                    held = None  # frees the last one first
                    held = methods[request["method"]](model, torch.tensor([request["tokens"]]), request["share"])
                    answer = _cost(model, held)
                else:
                    assert held is not None, "nothing was read yet"
                    answer = decode(model, held, request)
        except Exception as error:  # whatever the other project raises is an answer; the driver tells it
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        _reply(replies, answer)


def installed(name: str) -> str | None:
    """Version of a package, None where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cost(model: Any, held: Held) -> dict[str, Any]:
    return {
        "prefill_s": held.prefill_s,
        "compress_s": held.compress_s,
        "kv_bytes": held_bytes(held.cache),
        "kv_bytes_full": dense_bytes(model, held.num_tokens),
        "kv_bytes_peak": held.kv_bytes_peak,
        "held_tokens_mean": sum(layer.get_seq_length() for layer in held.cache.layers) / len(held.cache.layers),
    }


def _reply(replies: Any, answer: dict[str, Any]) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()
