"""Samplers draw from what transformers' own processors leave, and can be repeated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from steno.decode.sampler import GREEDY, Sampling
from steno.errors import BadArgument

VOCAB, DRAWS = 12, 1000
HISTORY = [3, 5, 5, 7]
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize(
    ("options", "processors"),
    [
        ({"temperature": 1.0}, []),
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"temperature": 1.0, "top_k": 3}, [TopKLogitsWarper(3)]),
        ({"temperature": 1.0, "top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"temperature": 1.0, "min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        ({"temperature": 1.0, "repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
        (
            {"temperature": 1.6, "top_k": 8, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
            [RepetitionPenaltyLogitsProcessor(1.2), TemperatureLogitsWarper(1.6), TopKLogitsWarper(8), TopPLogitsWarper(0.9),
             MinPLogitsWarper(0.05)],
        ),
    ],
)  # fmt: skip
def test_frequencies_are_those_of_transformers(options: dict[str, Any], processors: list[Any]) -> None:
    expected = LogitsProcessorList(processors)(torch.tensor([HISTORY]), LOGITS[None].clone())[0].softmax(-1)
    draw = Sampling(**options, seed=1).sampler()
    counts = torch.bincount(torch.tensor([draw(LOGITS, HISTORY) for _ in range(DRAWS)]), minlength=VOCAB)
    assert bool((counts[expected == 0] == 0).all())
    assert (counts / DRAWS - expected).abs().max() < 0.06


def test_greedy_takes_the_largest_and_heeds_only_the_penalty() -> None:
    best = int(LOGITS.argmax())
    assert GREEDY.sampler()(LOGITS, HISTORY) == best
    assert Sampling(top_k=1, top_p=0.1, min_p=0.5).sampler()(LOGITS, []) == best
    assert Sampling(repetition_penalty=50.0).sampler()(LOGITS.abs(), [int(LOGITS.abs().argmax())]) != int(
        LOGITS.abs().argmax()
    )


def test_seed_repeats_and_samplers_share_no_state() -> None:
    def sequence(seed: int | None) -> list[int]:
        draw = Sampling(temperature=1.0, seed=seed).sampler()
        return [draw(LOGITS, HISTORY) for _ in range(40)]

    state = torch.random.get_rng_state()
    assert sequence(3) == sequence(3)
    assert sequence(3) != sequence(4)
    assert sequence(None) != sequence(None)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_logits_are_not_changed() -> None:
    logits = LOGITS.clone()
    Sampling(temperature=0.7, top_k=2, repetition_penalty=2.0, seed=0).sampler()(logits, HISTORY)
    assert torch.equal(logits, LOGITS)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
    ],
)
def test_bad_values_are_named(options: dict[str, Any]) -> None:
    [name] = options
    with pytest.raises(BadArgument, match=f"`{name}` must be"):
        Sampling(**options)


def test_the_history_is_read_for_the_penalty_only() -> None:
    class Unread(list[int]):
        def __iter__(self):
            raise AssertionError("the history was read")

    history = Unread(HISTORY)
    for options in ({}, {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.1}):
        assert 0 <= Sampling(**options, seed=1).sampler()(LOGITS, history) < VOCAB
    with pytest.raises(AssertionError, match="was read"):
        Sampling(repetition_penalty=1.2).sampler()(LOGITS, history)
