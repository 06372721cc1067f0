"""The part of llama.cpp's C interface that a benchmark needs, for the one release that is pinned in `libllama.json`.

Structures are passed by value, so their layout is a part of the version; `load` compares the defaults that the library
returns with those of this layout and refuses another one.
"""

from __future__ import annotations

import ctypes as c
from pathlib import Path

import numpy as np

VERSION = "v0.5.0"


class ModelParams(c.Structure):
    """Never looked into: the defaults are passed on."""

    _fields_ = (("bytes", c.c_uint8 * 512),)


class ContextParams(c.Structure):
    _fields_ = (
        *((name, c.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max")),
        ("n_outputs_max_per_seq", c.c_uint32),
        *((name, c.c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, c.c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, c.c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, c.c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        *((name, c.c_void_p) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, c.c_int32) for name in ("type_k", "type_v")),
        *((name, c.c_void_p) for name in ("abort_callback", "abort_callback_data")),
        *(
            (name, c.c_bool)
            for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")
        ),
        ("samplers", c.c_void_p),
        ("n_samplers", c.c_size_t),
        ("room", c.c_uint8 * 256),
    )


DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1, "n_threads": 4,
    "n_threads_batch": 4, "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1,
    "yarn_ext_factor": -1.0, "yarn_beta_slow": -1.0, "defrag_thold": -1.0, "type_k": 1, "type_v": 1, "embeddings": False,
    "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True, "kv_unified": False, "n_samplers": 0,
}  # fmt: skip


class Batch(c.Structure):
    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


def load(folder: Path) -> c.CDLL:
    """The library, with the CPU backend that fits this machine best."""
    c.CDLL(str(folder / "libggml-base.so"), c.RTLD_GLOBAL)
    ggml = c.CDLL(str(folder / f"libggml.{VERSION}.so"), c.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    lib = c.CDLL(str(folder / f"libllama.{VERSION}.so"))
    for name, result, arguments in (
        ("llama_print_system_info", c.c_char_p, ()),
        ("llama_model_default_params", ModelParams, ()),
        ("llama_context_default_params", ContextParams, ()),
        ("llama_model_load_from_file", c.c_void_p, (c.c_char_p, ModelParams)),
        ("llama_init_from_model", c.c_void_p, (c.c_void_p, ContextParams)),
        ("llama_batch_init", Batch, (c.c_int32, c.c_int32, c.c_int32)),
        ("llama_decode", c.c_int32, (c.c_void_p, Batch)),
        ("llama_get_logits_ith", c.POINTER(c.c_float), (c.c_void_p, c.c_int32)),
        ("llama_get_memory", c.c_void_p, (c.c_void_p,)),
        ("llama_memory_seq_cp", None, (c.c_void_p, c.c_int32, c.c_int32, c.c_int32, c.c_int32)),
        ("llama_model_get_vocab", c.c_void_p, (c.c_void_p,)),
        ("llama_vocab_n_tokens", c.c_int32, (c.c_void_p,)),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    found = lib.llama_context_default_params()
    wrong = {name: getattr(found, name) for name, value in DEFAULTS.items() if getattr(found, name) != value}
    if wrong:
        raise RuntimeError(f"libllama {VERSION} should have other defaults than {wrong}: another layout?")
    return lib


class Context:
    """A model and the caches of `sequences` sequences of `tokens` positions each, every one in memory of its own."""

    def __init__(self, lib: c.CDLL, path: Path, *, sequences: int, tokens: int, kv_type: int, threads: int) -> None:
        self.lib = lib
        model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * tokens, sequences
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = kv_type
        params.flash_attn_type = 1
        params.kv_unified = False
        self.context = lib.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context; see its messages above")
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self.batch_tokens = params.n_batch
        self.batch = lib.llama_batch_init(self.batch_tokens, 0, 1)

    def read(self, prompt: list[int]) -> int:
        """Reads a prompt into sequence 0 in batches; the greedy token after it."""
        last = len(prompt) - 1
        for start in range(0, len(prompt), self.batch_tokens):
            chunk = prompt[start : start + self.batch_tokens]
            self._decode([(token, i, 0, i == last) for i, token in enumerate(chunk, start)])
        return self._best(len(chunk) - 1)

    def copy(self, sequences: int) -> None:
        """Copies sequence 0 to all others; done by the library before it decodes next."""
        memory = self.lib.llama_get_memory(self.context)
        for i in range(1, sequences):
            self.lib.llama_memory_seq_cp(memory, 0, i, -1, -1)

    def step(self, tokens: list[int], position: int) -> list[int]:
        """One token of each sequence at `position`; the greedy tokens after them."""
        self._decode([(token, position, i, True) for i, token in enumerate(tokens)])
        return [self._best(i) for i in range(len(tokens))]

    def _decode(self, items: list[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(items)
        for i, (token, position, sequence, wanted) in enumerate(items):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = self.lib.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _best(self, i: int) -> int:
        return int(np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (self.vocab,)).argmax())
