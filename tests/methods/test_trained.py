"""Keyformer, Locret and TRIM-KV: the invariants of their papers, and oracles written as loops."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from random_layers import make_layer, with_weights

from steno.calibration import save_calibration
from steno.errors import CalibrationError
from steno.methods.score.h2o import H2O
from steno.methods.score.keyformer import Keyformer
from steno.methods.score.locret import Locret
from steno.methods.score.trim_kv import TrimKV

QUIET = {"noise": False, "tau_init": 1.0, "tau_end": 1.0, "sampled": 10**6}


def whole_layer(num_tokens: int, **kwargs: Any) -> tuple[Any, Any]:
    """A layer whose queries are those of the whole prompt, and the attention that they give."""
    kv, obs = make_layer(num_tokens, window=num_tokens, **kwargs)
    group = obs.queries.shape[0] // kv.num_kv_heads
    logits = obs.queries @ kv.keys.repeat_interleave(group, 0).mT * obs.scaling
    mass = logits.masked_fill(torch.ones(num_tokens, num_tokens).triu(1).bool(), -torch.inf).softmax(-1).sum(1)
    return kv, dataclasses.replace(obs, attention_mass=mass)


@pytest.mark.parametrize(("num_tokens", "group", "dim"), [(1, 1, 64), (7, 3, 80), (150, 8, 128), (257, 1, 8)])
def test_keyformer_without_noise_is_h2o(num_tokens: int, group: int, dim: int) -> None:
    kv, obs = whole_layer(num_tokens, group=group, dim=dim, budget=10)
    mine, its = Keyformer(**QUIET), H2O(heavy_share=0.7)
    torch.testing.assert_close(mine.prefill_state(kv, obs), its.prefill_state(kv, obs), rtol=1e-4, atol=1e-5)
    weights = torch.rand(2 * group, num_tokens).softmax(-1)
    state = its.prefill_state(kv, obs)
    torch.testing.assert_close(mine.observe(state, weights, step=3), its.observe(state, weights, step=3))
    torch.testing.assert_close(mine.score(kv, obs), its.score(kv, obs), rtol=1e-4, atol=1e-5)


def test_keyformer_sampled_queries_stand_for_all() -> None:
    kv, obs = whole_layer(150, group=2)
    queries = obs.queries.reshape(2, 2, 150, -1)
    for count, last in ((1, [149]), (4, [36, 74, 111, 149])):
        logits = queries[:, :, last] @ kv.keys[:, None].mT * obs.scaling  # [Hkv, G, count, S]
        weights = logits.masked_fill(torch.arange(150) > torch.tensor(last)[:, None], -torch.inf).softmax(-1)
        expected = weights.sum((1, 2)) * 150 / count
        state = Keyformer(**QUIET | {"sampled": count}).prefill_state(kv, obs)
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(Keyformer(sampled=150).prefill_state(kv, obs), Keyformer(sampled=10**6).prefill_state(kv, obs))


def test_keyformer_noise_is_gumbels() -> None:
    torch.manual_seed(0)
    method, logits, tau = Keyformer(), torch.randn(1, 6), 1.7
    mine = method._noised_weights(logits.expand(200_000, 6), tau, method._generator(logits.device, 3))
    gumbel = -torch.empty(200_000, 6).exponential_().log()
    expected = ((logits + gumbel) / tau).softmax(-1)
    for power in (1, 2):  # the same distribution: 5 standard errors of a mean of numbers from 0 to 1
        assert (mine.pow(power).mean(0) - expected.pow(power).mean(0)).abs().max() < 5 * (0.5 / 200_000) ** 0.5


def test_keyformer_temperature() -> None:
    method = Keyformer(tau_init=1.0, tau_end=2.0, anneal_tokens=8)
    assert [method.temperature(step) for step in (0, 2, 8, 9)] == [1.0, 1.25, 2.0, 2.0]
    weights = torch.tensor([[0.5, 0.1, 0.4]])
    flat = Keyformer(noise=False, anneal_tokens=8).observe(torch.zeros(1, 3), weights, step=8)
    assert torch.allclose(flat, weights.sqrt() / weights.sqrt().sum())
    gone = Keyformer().observe(torch.zeros(1, 3), torch.tensor([[0.5, 0.0, 0.5]]), step=1)
    assert gone[0, 1] == 0
    assert gone.sum() == pytest.approx(1)


def test_keyformer_noise_is_drawn_anew_and_the_same_again() -> None:
    kv, obs = whole_layer(40)
    method, zeros, weights = Keyformer(), torch.zeros(2, 40), torch.full((6, 40), 1 / 40)
    assert torch.equal(method.prefill_state(kv, obs), method.prefill_state(kv, obs))
    other_layer = dataclasses.replace(obs, layer_idx=2)
    assert not torch.equal(method.prefill_state(kv, obs), method.prefill_state(kv, other_layer))
    assert not torch.equal(method.prefill_state(kv, obs), Keyformer(seed=1).prefill_state(kv, obs))
    assert not torch.equal(method.observe(zeros, weights, step=1), method.observe(zeros, weights, step=2))
    assert torch.allclose(method.prefill_state(kv, obs).sum(-1), torch.full((2,), 3 * 40.0))


def test_keyformer_noise_does_not_hide_a_planted_key() -> None:
    kv, obs = whole_layer(60, budget=8)
    keys, queries = kv.keys.clone(), obs.queries.clone()
    queries[..., 0], keys[..., 0], keys[:, 7, 0] = 20.0, 0.0, 20.0
    planted = dataclasses.replace(kv, keys=keys)
    for seed in range(5):
        scores = Keyformer(seed=seed).score(planted, dataclasses.replace(obs, queries=queries))
        best = scores.topk(8).indices
        assert (best == 7).any(-1).all()
        assert torch.isposinf(scores).sum(-1).tolist() == [2, 2]


def test_locret_equals_the_loop() -> None:
    kv, obs = make_layer(6)
    method = with_weights(Locret(n_local=0))
    from steno.calibration import load_calibration

    tensors = load_calibration(method.weights, ("w1", "w2"))
    scores = method.score(kv, obs)
    for token in range(6):
        parts = (obs.pre_rope_queries[:, token], obs.pre_rope_keys[:, token], kv.values[:, token])
        inner = tensors["w1"][1] @ torch.cat([part.flatten() for part in parts])
        expected = tensors["w2"][1] @ torch.tensor([x / (1 + math.exp(-x)) for x in inner.tolist()])
        assert torch.allclose(scores[:, token], expected, atol=1e-4)


def test_locret_keeps_stabilizers_on_the_way_and_local_tokens_at_the_end() -> None:
    state, positions = torch.zeros(2, 10), torch.arange(3, 13).expand(2, -1)
    method = Locret(n_local=2, stabilizers=0.5)
    kept = [
        torch.isposinf(method.retention(state, state, positions, budget_tokens=6, is_last=last)).sum(-1).tolist()
        for last in (False, True)
    ]
    assert kept == [[3, 3], [2, 2]]
    assert torch.isposinf(method.retention(state, state, positions, budget_tokens=6, is_last=False))[:, -3:].all()


def retained(log_beta: torch.Tensor, count: int, sinks: int = 0) -> list[list[int]]:
    """What TRIM-KV keeps of tokens with these rates, `[Hkv, n]`."""
    positions = torch.arange(log_beta.shape[1]).expand(len(log_beta), -1)
    scores = TrimKV(sinks=sinks).retention(log_beta, log_beta, positions, budget_tokens=count, is_last=True)
    return [sorted(row.tolist()) for row in scores.topk(count).indices]


def test_trim_kv_patterns() -> None:
    window = torch.full((2, 20), -0.01)
    assert retained(window, 6) == [[14, 15, 16, 17, 18, 19]] * 2  # one rate for all: a sliding window
    assert retained(window * 0, 6) == [[14, 15, 16, 17, 18, 19]] * 2  # nothing is forgotten: ties go to the newer
    sinks = window.clone()
    sinks[:, :4] = 0
    assert retained(sinks, 6) == [[0, 1, 2, 3, 18, 19]] * 2
    assert retained(window, 6, sinks=4) == [[0, 1, 2, 3, 18, 19]] * 2
    needle = torch.full((1, 5000), -1e-4)
    needle[0, 17] = 0
    assert retained(needle, 3) == [[17, 4998, 4999]]


def test_trim_kv_ages_begin_with_two() -> None:
    log_beta = torch.tensor([[-1.0, -1.0, -3.0]])
    scores = TrimKV().retention(log_beta, log_beta, torch.tensor([[5, 8, 9]]), budget_tokens=1, is_last=True)
    assert scores.tolist() == [[-6.0, -3.0, -6.0]]


def test_trim_kv_gate_equals_the_loop() -> None:
    from steno.calibration import load_calibration

    kv, obs = make_layer(5)
    method = with_weights(TrimKV())
    tensors = load_calibration(method.weights, ("w1", "b1", "w2", "bias"))
    for token, log_beta in enumerate(method.token_state(kv, obs).T):
        inner = tensors["w1"][1] @ obs.hidden_states[token] + tensors["b1"][1]
        logit = tensors["w2"][1] @ (inner * inner.sigmoid()) + tensors["bias"][1]
        assert torch.allclose(log_beta, logit.sigmoid().log(), atol=1e-4)


@pytest.mark.parametrize("method", [Locret(), TrimKV()], ids=lambda method: method.id)
def test_weights_of_another_model_are_refused(method: Any, tmp_path: Path) -> None:
    kv, obs = make_layer(5)
    with pytest.raises(CalibrationError, match="train on this model"):
        with_weights(method, hkv=1).score(kv, obs)
    names = {"locret": ("w1", "w2"), "trim_kv": ("w1", "b1", "w2", "bias")}[method.id]
    save_calibration(tmp_path / "flat", {name: torch.ones(2) for name in names}, {})
    with pytest.raises(CalibrationError, match="train on this model"):
        dataclasses.replace(method, weights=str(tmp_path / "flat")).score(kv, obs)
