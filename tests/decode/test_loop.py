"""The loop: whatever is drafted, the answer is that of plain decoding, and the cache can go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch

import steno
from steno.decode.loop import Proposer, Step, decode_steps, propose_nothing
from steno.decode.sampler import GREEDY, Sampling
from steno.errors import BadArgument
from tiny import VOCAB, build, prompt

PROMPT = prompt(40)[0].tolist()
NEW_TOKENS = 33


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    found = {name: build(name) for name in ("llama", "gemma3")}
    for model in found.values():
        model.set_attn_implementation("steno")
    return found


def decode(
    model: Any, recipe: str, proposer: Proposer = propose_nothing, **options: Any
) -> tuple[list[Step], steno.KVCache]:
    cache = steno.KVCache(model.config, recipe)
    options = {"sampler": GREEDY.sampler(), "max_new_tokens": NEW_TOKENS, **options}
    steps = list(decode_steps(model, cache, PROMPT, proposer=proposer, **options))
    cache.check_integrity()
    return steps, cache


@pytest.fixture(scope="module")
def plain(models: dict[str, Any]) -> Callable[[str, str], list[int]]:
    """The answer of plain decoding, by model and recipe."""
    return lru_cache(lambda name, recipe: flat(decode(models[name], recipe)[0]))


Plain = Callable[[str, str], list[int]]


def flat(steps: list[Step]) -> list[int]:
    return [token for step in steps for token in step.token_ids]


def drafts(answer: list[int], kind: str) -> Proposer:
    """Knows the answer, and tells it, a lie, or some of both."""

    def propose(history: Sequence[int]) -> list[int]:
        done = len(history) - len(PROMPT)
        truth = answer[done : done + 4]
        if kind == "right":
            return truth
        if kind == "wrong":
            return [(t + 1) % VOCAB for t in truth]
        if kind == "mixed":
            return [t if (done + i) % 3 else (t + 1) % VOCAB for i, t in enumerate(truth)][: done % 5]
        return truth + [2] * 60  # far beyond the limit

    return propose


@pytest.mark.parametrize("kind", ["right", "wrong", "mixed", "long"])
@pytest.mark.parametrize("recipe", ["full", "int8", "keydiff | adakv @ 20"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_drafts_change_nothing_but_the_number_of_passes(
    models: dict[str, Any], plain: Plain, name: str, recipe: str, kind: str
) -> None:
    answer = plain(name, recipe)
    steps, cache = decode(models[name], recipe, drafts(answer, kind))
    assert flat(steps) == answer
    assert cache.seen_tokens == len(PROMPT) + NEW_TOKENS - 1
    kept = 20 if "20" in recipe else len(PROMPT)
    assert all(sum(layer[0]) == 2 * (kept + NEW_TOKENS - 1) for layer in cache.held_tokens())
    assert len(answer) == NEW_TOKENS
    assert [step.nfe for step in steps] == list(range(1, len(steps) + 1))
    if kind == "right":
        assert len(steps) == 1 + -(-(NEW_TOKENS - 1) // 5)
    if kind == "wrong":
        assert len(steps) == NEW_TOKENS


@pytest.mark.parametrize("kind", ["right", "wrong", "mixed"])
def test_drafts_within_one_page_change_nothing_under_int4(models: dict[str, Any], kind: str) -> None:
    answer = flat(decode(models["llama"], "int4", max_new_tokens=24)[0])
    assert flat(decode(models["llama"], "int4", drafts(answer, kind), max_new_tokens=24)[0]) == answer


def test_sampling_with_drafts_draws_the_same(models: dict[str, Any]) -> None:
    def seeded() -> dict[str, Any]:
        return {"sampler": Sampling(temperature=0.8, top_k=20, seed=5).sampler()}

    answer = flat(decode(models["llama"], "full", **seeded())[0])
    assert flat(decode(models["llama"], "full", drafts(answer, "mixed"), **seeded())[0]) == answer


@pytest.mark.parametrize("kind", [None, "right", "long"])
def test_end_token_ends_the_answer(models: dict[str, Any], plain: Plain, kind: str | None) -> None:
    answer = plain("llama", "full")
    end = answer[12]
    proposer = drafts(answer, kind) if kind else propose_nothing
    steps, cache = decode(models["llama"], "full", proposer, end_tokens=frozenset({end}))
    assert flat(steps) == answer[: answer.index(end) + 1]
    assert cache.seen_tokens == len(PROMPT) + len(flat(steps)) - 1


@pytest.mark.parametrize("limit", [0, 1, 2, 7])
def test_limit_on_tokens(models: dict[str, Any], plain: Plain, limit: int) -> None:
    answer = plain("llama", "full")
    for proposer in (propose_nothing, drafts(answer, "long")):
        assert flat(decode(models["llama"], "full", proposer, max_new_tokens=limit)[0]) == answer[:limit]


@pytest.mark.parametrize("recipe", ["full", "int4", "tova @ 20", "keydiff @ 20"])
@pytest.mark.parametrize("taken", [1, 2, 10])
def test_closing_leaves_a_cache_that_goes_on(models: dict[str, Any], plain: Plain, recipe: str, taken: int) -> None:
    model, cache = models["llama"], steno.KVCache(models["llama"].config, recipe)
    answer = plain("llama", recipe)
    proposer = drafts(answer, "mixed") if recipe in ("full", "keydiff @ 20") else propose_nothing
    steps = decode_steps(model, cache, PROMPT, sampler=GREEDY.sampler(), max_new_tokens=NEW_TOKENS, proposer=proposer)
    done: list[int] = []
    for _ in range(taken):
        done += next(steps).token_ids
    steps.close()
    cache.check_integrity()
    assert cache.seen_tokens == len(PROMPT) + len(done) - 1
    rest = decode_steps(
        model,
        cache,
        done[-1:],
        history=PROMPT + done[:-1],
        sampler=GREEDY.sampler(),
        max_new_tokens=NEW_TOKENS - len(done),
    )
    assert done + flat(list(rest)) == answer
    with torch.no_grad():
        assert model(torch.tensor([answer[-1:]]), past_key_values=cache).logits.isfinite().all()


def test_logprobs_are_of_the_plain_logits(models: dict[str, Any]) -> None:
    steps, _ = decode(models["llama"], "full", keep_logprobs=True, max_new_tokens=6)
    ids = PROMPT + flat(steps)
    with torch.no_grad():
        expected = models["llama"](torch.tensor([ids]), use_cache=False).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    assert torch.allclose(torch.cat([step.logprobs for step in steps]), expected, atol=1e-3)
    assert all(step.logprobs is None for step in decode(models["llama"], "full", max_new_tokens=2)[0])


def test_nothing_to_continue_from(models: dict[str, Any]) -> None:
    with pytest.raises(BadArgument, match="at least one token"):
        next(decode_steps(models["llama"], None, [], sampler=GREEDY.sampler(), max_new_tokens=1))
