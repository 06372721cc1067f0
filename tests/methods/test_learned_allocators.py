"""PrefixKV, RazorAttention, EMS's head budgets and ZipVL's ratio: sums over the model, and the invariants of their cards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steno.calibration import save_calibration
from steno.errors import CalibrationError
from steno.learn.prefixkv import curve
from steno.methods.allocate.ems_heads import EMSHeads, tokens_for_mass
from steno.methods.allocate.prefixkv import POINTS, PrefixKV, kept_shares, layer_counts
from steno.methods.allocate.razorattention import RazorAttention, head_counts
from steno.methods.allocate.rounding import largest_remainder
from steno.methods.allocate.zipvl import ZipVL, tokens_for_share


def random_curves(num_layers: int, num_tokens: int, seed: int) -> torch.Tensor:
    """Curves of layers that concentrate their attention more and less."""
    masses = torch.rand(num_layers, num_tokens, generator=torch.Generator().manual_seed(seed))
    return torch.stack([curve(mass ** (1 + 3 * i)) for i, mass in enumerate(masses)])


@given(
    layers=st.integers(1, 6), num_tokens=st.integers(1, 300), budget=st.integers(1, 300), protected=st.integers(1, 40),
    seed=st.integers(0, 20),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_prefixkv_sums_to_the_budget(layers: int, num_tokens: int, budget: int, protected: int, seed: int) -> None:
    curves = random_curves(layers, 64, seed)
    counts = layer_counts(curves, num_tokens, budget, protected)
    assert sum(counts) == layers * min(budget, num_tokens)
    assert all(min(protected, budget, num_tokens) <= n <= num_tokens for n in counts)


def test_prefixkv_layers_keep_an_equal_share() -> None:
    curves = random_curves(4, 500, 0)
    counts = layer_counts(curves, 1000, 300, 1)
    assert list(counts) == sorted(counts, reverse=True)
    held = [torch.quantile(c, (n - 1) / 999, interpolation="linear") for c, n in zip(curves, counts, strict=True)]
    assert max(held) - min(held) < 0.01
    assert kept_shares(curves, 0.0).tolist() == [0.0] * 4


def test_prefixkv_by_hand() -> None:
    flat, one_hot = curve(torch.ones(200)), curve(torch.eye(200)[3])
    assert torch.allclose(flat, torch.linspace(0, 1, POINTS, dtype=torch.float64))
    assert [float(kept_shares(flat[None], share)) for share in (0.25, 1.0)] == pytest.approx([0.25, 1.0])
    assert layer_counts(torch.stack([flat] * 3), 100, 37, 2) == (37,) * 3
    counts = layer_counts(torch.stack([flat, one_hot, flat]), 100, 40, 1)
    assert counts[1] == min(counts) < 5
    assert counts[0] == counts[2] or abs(counts[0] - counts[2]) == 1
    assert layer_counts(torch.stack([flat, one_hot]), 100, 100, 1) == (100, 100)
    assert layer_counts(torch.stack([flat, one_hot]), 1, 1, 1) == (1, 1)


@given(
    heads=st.integers(1, 12), num_ranked=st.integers(0, 12), num_tokens=st.integers(1, 100),
    budget=st.integers(1, 120), protected=st.integers(1, 30),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_razorattention_sums_to_the_budget(
    heads: int, num_ranked: int, num_tokens: int, budget: int, protected: int
) -> None:
    ranked = list(range(heads))[::-1][:num_ranked]
    counts = head_counts(ranked, heads, num_tokens, budget, protected)
    assert sum(counts) == heads * min(budget, num_tokens)
    assert all(min(protected, budget, num_tokens) <= n <= num_tokens for n in counts)


def test_razorattention_by_hand() -> None:
    assert head_counts([5, 2], 6, 100, 40, 4) == [10, 10, 100, 10, 10, 100]
    assert head_counts([5, 2], 6, 100, 20, 4) == [4, 4, 4, 4, 4, 100]  # the budget holds one of them
    assert head_counts([5, 2], 6, 100, 21, 4) == [6, 5, 5, 5, 5, 100]
    assert head_counts(list(range(6)), 6, 100, 100, 4) == [100] * 6
    induction = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    echo = torch.tensor([[0.5, 0.1], [0.1, 0.1]])
    assert RazorAttention(induction=0.5, echo=0.25).retrieval_heads(induction, echo) == [0, 1, 2]
    assert RazorAttention(induction=0.25, echo=0).retrieval_heads(induction, echo) == [1]
    assert RazorAttention(induction=0, echo=0).retrieval_heads(induction, echo) == []
    tied = torch.ones(2, 2)
    assert RazorAttention(induction=0.5, echo=0).retrieval_heads(tied, tied) == [0, 1]


@pytest.mark.parametrize(("method", "name"), [(PrefixKV, "curves"), (RazorAttention, "induction")])
def test_a_file_of_another_model_is_refused(method: type, name: str, tmp_path: Path) -> None:
    place = tmp_path / "x.safetensors"
    save_calibration(place, {name: torch.ones(3, 3), "echo": torch.ones(3, 3)}, {})
    with pytest.raises(CalibrationError, match="calibrate on this model"):
        method(weights=str(place)).allocate(torch.rand(2, 9), budget_tokens=4, layer_idx=0, num_layers=4)


def test_ems_heads_follow_their_sparsity() -> None:
    scores = torch.full((3, 100), 0.01)
    scores[0, 5], scores[2, :50] = 100.0, 1.0
    assert tokens_for_mass(scores, 0.9).tolist() == [1, 90, 46]
    counts = EMSHeads(floor=0).allocate(scores, budget_tokens=20, layer_idx=0, num_layers=1)
    assert counts.sum() == 60
    assert counts[0] < counts[2] < counts[1]
    assert EMSHeads(floor=1).allocate(scores, budget_tokens=20, layer_idx=0, num_layers=1).tolist() == [20] * 3
    assert tokens_for_mass(torch.tensor([[-3.0, -1, -3], [torch.inf, 0, 0]]), 0.9).tolist() == [1, 1]


@given(num_tokens=st.integers(1, 60), seed=st.integers(0, 30), tau=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_zipvl_keeps_the_fewest_that_reach_tau(num_tokens: int, seed: int, tau: float) -> None:
    scores = torch.rand(2, num_tokens, generator=torch.Generator().manual_seed(seed))
    p = tokens_for_share(scores, tau)
    layer = scores.double().sum(0).sort(descending=True).values
    assert layer[:p].sum() >= tau * layer.sum() * (1 - 1e-9)
    assert p == 1 or layer[: p - 1].sum() < tau * layer.sum()
    assert p <= tokens_for_share(scores, min(1.0, tau + 0.1))


def test_zipvl_by_hand() -> None:
    assert tokens_for_share(torch.ones(2, 40), 0.975) == 39
    assert tokens_for_share(torch.ones(2, 40), 1.0) == 40
    assert tokens_for_share(torch.eye(40)[:1], 0.975) == 1
    scores = torch.ones(2, 40)
    scores[:, -3:] = torch.inf
    assert ZipVL(tau=0.5).allocate(scores, budget_tokens=40, layer_idx=0, num_layers=1).tolist() == [22, 22]
    assert ZipVL(tau=0.5).allocate(scores, budget_tokens=9, layer_idx=0, num_layers=1).tolist() == [9, 9]


def test_largest_remainder() -> None:
    assert largest_remainder([1.5, 2.5, 0.0], [9, 9, 9], 4) == [2, 2, 0]
    assert largest_remainder([5.0, 5.0], [2, 9], 10) == [2, 8]
    assert largest_remainder([5.0, 5.0], [2, 3], 10) == [2, 3]
