"""The parts of access methods: what they note of tokens, how they rank it, and their plans."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from access_oracle import draw, quest_bound, read
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layers import make_layer

from steno.cache.ragged import best, with_ends
from steno.cache.text import TokenText
from steno.calibration import save_calibration
from steno.errors import BadArgument, CalibrationError
from steno.methods import DELTA, DoubleSparsity, HyLRA, MoBA, Quest, SentenceKV
from steno.methods.access.double_sparsity import channel_importance
from steno.methods.access.hylra import best_sources, mass_ratio, plan_layers, robust_mean
from steno.types import PAGE_TOKENS


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_best_is_a_stable_sort(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    levels = st.sampled_from([-math.inf, 0.0, 1.0, 2.0, math.inf])
    scores = torch.tensor([[data.draw(levels) for _ in range(width)] for _ in range(rows)])
    counts = torch.tensor([data.draw(st.integers(0, width + 2)) for _ in range(rows)])
    chosen = best(scores, counts)
    for line, count, mask in zip(scores.tolist(), counts.tolist(), chosen, strict=True):
        order = [i for i in sorted(range(width), key=lambda i: (-line[i], i)) if line[i] > -math.inf]
        assert sorted(order[:count]) == mask.nonzero()[:, 0].tolist()


def test_ends_are_forced() -> None:
    forced = with_ends(torch.zeros(2, 5), torch.tensor([5, 3]), first=1, last=torch.tensor([2, 0]))
    assert torch.isinf(forced).tolist() == [[True, False, False, True, True], [True, False, False, False, False]]


@given(seed=st.integers(0, 200), dim=st.integers(1, 9), tokens=st.integers(1, 150))
@settings(max_examples=40, deadline=None)
def test_bounds_of_quest_hold_for_every_token_of_a_page(seed: int, dim: int, tokens: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, keys = torch.randn(dim, generator=g), torch.randn(tokens, dim, generator=g)
    items = Quest().summarize(keys, None, None).vectors  # [P, 2 D]
    bounds = items @ torch.cat([q.clamp(min=0), q.clamp(max=0)])
    for page, bound in zip(keys.split(PAGE_TOKENS), bounds, strict=True):
        assert bound >= (page @ q).max() - 1e-4
        assert abs(float(bound) - quest_bound(q, page)) < 1e-4


def test_the_bound_is_tight_on_identical_keys() -> None:
    key, q = torch.randn(8), torch.randn(8)
    items = Quest().summarize(key.expand(70, 8), None, None).vectors
    assert torch.allclose(items @ torch.cat([q.clamp(min=0), q.clamp(max=0)]), (q @ key).expand(2), atol=1e-5)


def test_pages_of_quest() -> None:
    assert Quest(tokens=1024).num_pages == 16
    assert Quest(tokens=64).num_pages == 3


def test_means_of_moba_are_those_of_the_tokens_there_are() -> None:
    keys = torch.randn(70, 8)
    assert torch.allclose(
        MoBA().summarize(keys, None, None).vectors, torch.stack([keys[:64].mean(0), keys[64:].mean(0)])
    )


def test_labels_choose_rightly_where_only_their_channels_are_not_zero() -> None:
    keys = torch.zeros(100, 8)
    keys[:, [1, 6]] = torch.randn(100, 2)
    method = DoubleSparsity(channels=2)
    fixed = method.fix([keys], 0, 1)
    assert fixed.tolist() == [[1, 6]]
    q = torch.randn(8)
    assert torch.allclose(method.summarize(keys, fixed[0], None).vectors @ q[[1, 6]], keys @ q, atol=1e-5)


def test_channels_come_from_the_file_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "channels.safetensors"
    save_calibration(path, {"channel_importance": torch.arange(48.0).view(2, 3, 8).flip(2)}, {})
    method = DoubleSparsity(channels=3, statistics=str(path))
    assert method.fix([torch.randn(5, 8)] * 3, 1, 2).tolist() == [[0, 1, 2]] * 3
    with pytest.raises(CalibrationError, match=r"\[4, 3, 8\]"):
        method.fix([torch.randn(5, 8)] * 3, 1, 4)


def test_channel_importance_by_hand() -> None:
    kv, obs = make_layer(7, hkv=2, group=3, dim=5, window=7)
    assert obs.queries is not None
    got = channel_importance(kv, obs)
    for h in range(2):
        for d in range(5):
            products = [abs(float(obs.queries[3 * h + g, t, d] * kv.keys[h, t, d])) for g in range(3) for t in range(7)]
            assert abs(float(got[h, d]) - sum(products) / 21) < 1e-5


def test_full_layers_of_delta() -> None:
    assert DELTA().full(28) == {0, 1, 2, 14, 22}
    assert DELTA().full(30) == {0, 1, 2, 15, 24}
    given = DELTA(full_layers="0, 3")
    assert given.full(9) == {0, 3}
    assert [given.reads_layer(i, 9) for i in range(9)] == [False] * 9
    assert [DELTA().reads_layer(i, 28) for i in (0, 1, 2, 3, 14)] == [True, True, False, False, False]
    for bad in ("1,2", "0,x", "0,,1", "-1,0", "", "0,99999999999"):
        with pytest.raises(BadArgument, match="full_layers"):
            DELTA(full_layers=bad)


# the plan of hylra


def test_layers_that_agree_share_one_source() -> None:
    assert best_sources([[1.0] * 6] * 6, 3) == [0] * 6
    assert plan_layers(torch.linspace(1, 0, 10), torch.ones(10, 10), sparsity=0.8) == [-1, -1, *[2] * 8]


@given(data=st.data(), num_layers=st.integers(1, 7), max_sources=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_least_overlap_is_as_large_as_any_plan_has(data: st.DataObject, num_layers: int, max_sources: int) -> None:
    shares = st.floats(0, 1)
    overlap = [[data.draw(shares) for _ in range(num_layers)] for _ in range(num_layers)]

    def least(plan: tuple[int, ...]) -> float:
        return min(1.0 if i == j else overlap[i][j] for j, i in enumerate(plan))

    plans = [(0,)]
    for layer in range(1, num_layers):
        plans = [(*p, x) for p in plans for x in (p[-1], layer) if len({*p, x}) <= max_sources]
    plan = tuple(best_sources(overlap, max_sources))
    assert plan in plans
    assert least(plan) == max(map(least, plans))


def test_a_plan_keeps_the_widest_layers_whole() -> None:
    ratios, overlap = torch.rand(12), torch.rand(12, 12)
    plan = plan_layers(ratios, overlap, sparsity=0.75)
    assert {i for i, s in enumerate(plan) if s < 0} == set(ratios.topk(3).indices.tolist())
    assert all(plan[s] == s for s in plan if s >= 0)
    assert all(s <= i for i, s in enumerate(plan))


def test_shares_of_mass_by_hand() -> None:
    chunks = torch.tensor([[0.5, 0.1, 0.4, 0.0], [0.25, 0.25, 0.25, 0.25], [0.95, 0.05, 0.0, 0.0]])
    assert mass_ratio(chunks).tolist() == [0.5, 1.0, 0.25]
    assert robust_mean(torch.tensor([1.0, 1, 1, 1, 100])).item() == 1.0


@pytest.mark.parametrize("sources", [[-1.0, 2.0, 2.0], [-1.0, 0.0, 0.0], [0.0, 0.0], [0.0, 0.0, -2.0]])
def test_plans_that_make_no_sense_are_refused(tmp_path: Path, sources: list[float]) -> None:
    path = tmp_path / "plan.safetensors"
    save_calibration(path, {"source_layer": torch.tensor(sources)}, {})
    with pytest.raises(CalibrationError, match="source_layer"):
        read(f"hylra(weights={str(path)!r})", draw(1, 5, seed=1))


def test_hylra_without_a_plan_says_what_it_needs() -> None:
    with pytest.raises(CalibrationError, match="run `steno calibrate hylra --model M` once"):
        HyLRA().reads_layer(0, 3)


# sentences and files


def test_means_of_sentences_are_those_of_their_tokens() -> None:
    keys, sentences = torch.randn(9, 4), torch.tensor([3, 3, 3, 3, 3, 4, 6, 6, 6])
    items = SentenceKV(max_sentence=3).summarize(keys, None, sentences)
    runs = [keys[:3], keys[3:5], keys[5:6], keys[6:]]
    assert items.lengths is not None
    assert items.lengths.tolist() == [3, 2, 1, 3]
    assert torch.allclose(items.vectors, torch.stack([run.mean(0) for run in runs]), atol=1e-6)


def test_text_counts_sentences_and_goes_back() -> None:
    text = TokenText(frozenset({7, 9}))
    text.announce([[1, 7, 2], [9, 9, 3]])
    text.announce([[9, 4], []])
    assert [row.tolist() for row in text.rows] == [[0, 0, 1, 1, 2], [0, 1, 2]]
    twin = text.fork()
    text.crop(2)
    text.announce([[5], [5]])
    assert [row.tolist() for row in text.rows] == [[0, 0, 1, 1], [0, 1]]
    assert [row.tolist() for row in twin.rows] == [[0, 0, 1, 1, 2], [0, 1, 2]]
    twin.select([1, 1])
    assert twin.newest().tolist() == [2, 2]
    with pytest.raises(BadArgument, match="2 rows"):
        twin.announce([[1]])
