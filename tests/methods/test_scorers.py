"""Scorers against oracles written as loops, and the invariants of their papers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from random_layers import make_layer
from torch import Tensor

from steno.methods.score.expected_attention import ExpectedAttention
from steno.methods.score.h2o import H2O
from steno.methods.score.keydiff import KeyDiff
from steno.methods.score.kvzip import KVzip, reconstruction_mass
from steno.methods.score.snapkv import SnapKV
from steno.methods.score.streaming_llm import StreamingLLM
from steno.methods.score.tova import TOVA
from steno.types import Observation, Rope

INF = math.inf


def attention(query: Tensor, keys: Tensor, scaling: float) -> list[float]:
    """Softmax of one query `[D]` over keys `[N, D]`, number by number."""
    exps = [math.exp(float(query @ key) * scaling) for key in keys]
    return [e / sum(exps) for e in exps]


def test_streaming_llm_keeps_sinks_then_the_newest() -> None:
    kv, obs = make_layer(6, hkv=1, group=1)
    assert StreamingLLM(n_sink=2).score(kv, obs).tolist() == [[INF, INF, 2, 3, 4, 5]]
    assert StreamingLLM(n_sink=0).score(kv, obs).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert StreamingLLM(n_sink=9).score(kv, obs).tolist() == [[INF] * 6]


def snapkv_window_mass(kv_head: int, kv: object, obs: Observation, window: int, group: int) -> list[float]:
    keys, s = kv.keys[kv_head], kv.num_tokens  # type: ignore[attr-defined]
    mass = [0.0] * (s - window)
    for g in range(group):
        for i in range(window):
            visible = keys[: s - window + i + 1]
            weights = attention(obs.queries[kv_head * group + g, i], visible, obs.scaling)  # type: ignore[index]
            mass = [m + w / (window * group) for m, w in zip(mass, weights[: s - window], strict=True)]
    return mass


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("kernel", "pool"), [(1, "avg"), (3, "avg"), (3, "max"), (5, "avg")])
def test_snapkv_equals_the_loop(group: int, kernel: int, pool: str) -> None:
    kv, obs = make_layer(9, group=group, window=4)
    scores = SnapKV(window=4, kernel=kernel, pool=pool).score(kv, obs)
    for head in range(2):
        mass = snapkv_window_mass(head, kv, obs, 4, group)
        half = kernel // 2
        for j in range(5):
            near = mass[max(0, j - half) : j + half + 1]
            expected = max(near) if pool == "max" else sum(near) / kernel
            assert scores[head, j].item() == pytest.approx(expected, rel=1e-5)
    assert torch.isposinf(scores[:, 5:]).all()


@pytest.mark.parametrize(("num_tokens", "protected"), [(1, 1), (4, 4), (5, 4)])
def test_snapkv_at_the_edge_of_the_window(num_tokens: int, protected: int) -> None:
    kv, obs = make_layer(num_tokens, window=4)
    scores = SnapKV(window=4).score(kv, obs)
    assert torch.isposinf(scores).sum(-1).tolist() == [protected] * 2


def test_tova_drops_what_the_last_query_attends_to_least() -> None:
    kv, obs = make_layer(7, group=3, window=1)
    scores = TOVA().score(kv, obs)
    mean = torch.zeros(7)
    for head in range(6):
        mean += torch.tensor(attention(obs.queries[head, -1], kv.keys[head // 3], obs.scaling)) / 6  # type: ignore[index]
    assert torch.allclose(scores, mean.expand(2, -1), atol=1e-6)
    assert torch.equal(scores[0], scores[1])
    weights = torch.tensor([[0.5, 0.1, 0.4], [0.1, 0.3, 0.6]])
    assert torch.allclose(TOVA().observe(torch.ones(2, 3), weights, step=1), torch.tensor([[0.3, 0.2, 0.5]] * 2))


def test_h2o_incremental_equals_recomputed() -> None:
    torch.manual_seed(0)
    h2o, budget, hkv, group = H2O(), 4, 2, 3
    steps = [torch.rand(hkv * group, 10) for _ in range(5)]
    kv, obs = make_layer(5, group=group, budget=budget)
    held = torch.arange(5).expand(hkv, -1)
    state = h2o.prefill_state(kv, obs)
    for step, full in enumerate(steps):
        held = torch.cat([held, torch.full((hkv, 1), 5 + step)], 1)
        state = torch.cat([state, torch.zeros(hkv, 1)], 1)
        weights = full.gather(1, held.repeat_interleave(group, 0))
        state = h2o.observe(state, weights, step=step + 1)
        order = h2o.priority(state, held, budget).argsort(descending=True, stable=True)[:, :budget].sort().values
        held, state = held.gather(1, order), state.gather(1, order)
        assert (held[:, -2:] == torch.tensor([4 + step, 5 + step])).all()
    for head in range(hkv):
        for slot in range(budget):
            token = int(held[head, slot])
            heads = slice(head * group, (head + 1) * group)
            seen = obs.attention_mass[heads, token].sum() if token < 5 else torch.tensor(0.0)  # type: ignore[index]
            seen = seen + sum(full[heads, token].sum() for i, full in enumerate(steps) if token <= 5 + i)
            assert state[head, slot].item() == pytest.approx(float(seen), rel=1e-5)


def test_h2o_shares() -> None:
    kv, obs = make_layer(8, budget=4)
    assert torch.isposinf(H2O(heavy_share=0).score(kv, obs)).sum(-1).tolist() == [4, 4]
    assert torch.isposinf(H2O(heavy_share=1).score(kv, obs)).sum() == 0
    assert torch.isposinf(H2O(heavy_share=0.5).score(kv, obs)).sum(0).tolist() == [0, 0, 0, 0, 0, 0, 2, 2]


def test_keydiff_equals_the_loop_and_keeps_the_odd_key() -> None:
    kv, obs = make_layer(6)
    scores = KeyDiff().score(kv, obs)
    for head, keys in enumerate(kv.keys):
        unit = [key / key.norm() for key in keys]
        anchor = torch.stack(unit).mean(0)
        for j, key in enumerate(keys):
            assert scores[head, j].item() == pytest.approx(-float(key @ anchor / key.norm() / anchor.norm()), abs=1e-5)
    keys = torch.ones(1, 5, 4)
    keys[0, 3] = torch.tensor([1.0, -1, 1, -1])
    odd = dataclasses.replace(kv, keys=keys, values=keys, positions=torch.arange(5))
    assert int(KeyDiff().score(odd, obs).argmax()) == 3


def test_keydiff_zero_keys_are_not_nan() -> None:
    kv, obs = make_layer(4)
    assert torch.equal(KeyDiff().score(dataclasses.replace(kv, keys=kv.keys * 0), obs).abs(), torch.zeros(2, 4))


def rotation(rope: Rope, position: int, dim: int) -> Tensor:
    """The matrix R with R q = q rotated at `position`."""
    half = rope.inv_freq.shape[0]
    matrix = torch.eye(dim)
    for i, freq in enumerate(rope.inv_freq.tolist()):
        c, s = math.cos(position * freq), math.sin(position * freq)
        matrix[i, i], matrix[i, i + half], matrix[i + half, i], matrix[i + half, i + half] = c, -s, s, c
    return matrix


@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize("future", [1, 6])
def test_expected_attention_equals_the_loop(rotated: int, future: int) -> None:
    kv, obs = make_layer(9, group=3)
    obs = dataclasses.replace(obs, rope=Rope(inv_freq=100.0 ** (-torch.arange(0, rotated, 2) / rotated)))
    method = ExpectedAttention(future_positions=future, n_sink=2, eps=0.01)
    scores = method.score(kv, obs)
    mean_rotation = sum(rotation(obs.rope, p, 8) for p in range(9, 9 + future)) / future  # type: ignore[arg-type]
    for head in range(2):
        expected = torch.zeros(7)
        for q_head in range(head * 3, head * 3 + 3):
            mu = mean_rotation @ obs.query_mean[q_head]  # type: ignore[index]
            cov = mean_rotation @ obs.query_cov[q_head] @ mean_rotation.T  # type: ignore[index]
            z = [float(mu @ k) * obs.scaling + float(k @ cov @ k) * obs.scaling**2 / 2 for k in kv.keys[head, 2:]]
            expected += torch.tensor(z).softmax(0) / 3
        expected = (expected + 0.01) * kv.values[head, 2:].norm(dim=-1)
        assert torch.allclose(scores[head, 2:], expected, atol=1e-5)
    assert torch.isposinf(scores[:, :2]).all()


def test_expected_attention_without_covariance_is_the_mean_query() -> None:
    kv, obs = make_layer(9, group=1)
    plain = ExpectedAttention(covariance=False, value_norm=False, n_sink=0, future_positions=1).score(kv, obs)
    zero = dataclasses.replace(obs, query_cov=torch.zeros(2, 8, 8))
    assert torch.allclose(plain, ExpectedAttention(value_norm=False, n_sink=0, future_positions=1).score(kv, zero))
    assert torch.allclose(plain.sum(-1), torch.ones(2))


def test_expected_attention_matches_monte_carlo() -> None:
    kv, obs = make_layer(5, hkv=1, group=1)
    score = ExpectedAttention(n_sink=0, value_norm=False).score(kv, dataclasses.replace(obs, rope=None))
    g = torch.Generator().manual_seed(1)
    root = torch.linalg.cholesky(obs.query_cov[0] + 1e-6 * torch.eye(8))  # type: ignore[index]
    queries = obs.query_mean[0] + torch.randn(400_000, 8, generator=g) @ root.T  # type: ignore[index]
    mean_exp = (queries @ kv.keys[0].T * obs.scaling).exp().mean(0)
    assert torch.allclose(score[0], mean_exp / mean_exp.sum(), atol=1e-2)


def test_expected_attention_is_linear_in_the_values() -> None:
    kv, obs = make_layer(9)
    method = ExpectedAttention(n_sink=1)
    scaled = method.score(dataclasses.replace(kv, values=kv.values * 3), obs)
    assert torch.allclose(scaled, method.score(kv, obs) * 3)


def test_kvzip_scores_are_the_replay_behind_the_sinks() -> None:
    kv, obs = make_layer(6)
    scores = KVzip(n_sink=2).score(kv, obs)
    assert torch.isposinf(scores[:, :2]).all()
    assert torch.equal(scores[:, 2:], obs.replay_mass[:, 2:])


@pytest.mark.parametrize(("budget", "protected"), [(12, 3), (8, 2), (3, 0)])
def test_kvzip_protects_a_window_of_at_most_a_quarter_of_the_budget(budget: int, protected: int) -> None:
    kv, obs = make_layer(9)
    scores = KVzip(n_sink=2, window=3).score(kv, dataclasses.replace(obs, budget_tokens=budget))
    assert torch.isposinf(scores).tolist() == [[i < 2 or i >= 9 - protected for i in range(9)]] * 2
    assert torch.equal(scores[:, 2:6], obs.replay_mass[:, 2:6])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("tq", "m", "n", "group", "block"), [(1, 1, 0, 1, 4), (7, 5, 2, 3, 3), (6, 9, 4, 2, 256)])
def test_reconstruction_mass_equals_the_dense_loop(
    softcap: float | None, tq: int, m: int, n: int, group: int, block: int
) -> None:
    torch.manual_seed(tq)
    q, chunk, sink, own = (torch.randn(h, t, 4) for h, t in ((2 * group, tq), (2, m), (2, n), (2, tq)))
    mass = reconstruction_mass(q, chunk, sink, own, scaling=0.7, softcap=softcap, block=block)
    expected = torch.zeros(2, m)
    for head in range(2 * group):
        kv_head = head // group
        for i in range(tq):
            keys = torch.cat([sink[kv_head], chunk[kv_head], own[kv_head, : i + 1]])
            logits = keys @ q[head, i] * 0.7
            logits = logits if softcap is None else softcap * (logits / softcap).tanh()
            expected[kv_head] = torch.maximum(expected[kv_head], logits.softmax(0)[n : n + m])
    assert torch.allclose(mass, expected, atol=1e-6)


def test_reconstruction_mass_of_a_copying_head_is_one_everywhere() -> None:
    keys = torch.eye(8)[None] * 30
    mass = reconstruction_mass(keys, keys, keys[:, :0], torch.zeros(1, 8, 8), scaling=1.0)
    assert torch.allclose(mass, torch.ones(1, 8), atol=1e-4)
    assert not reconstruction_mass(keys * 1e4, keys, keys[:, :0], keys * 0, scaling=1.0).isnan().any()
