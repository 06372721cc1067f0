"""The seams for methods: segments that attend by themselves, encoders without a page format, entries that stand for many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import steno
from steno.cache.accounting import held_bytes
from steno.cache.layer import LayerCache
from steno.cache.policy import Selection
from steno.cache.segment import DenseSegment, HeadKV, Segment
from steno.errors import BudgetError, IntegrityError, RecipeError
from steno.kernels.attention import attend_heads
from steno.pipeline import RecipePolicy
from steno.recipe import as_recipe
from steno.types import KeptTokens, LayerKV, Merged, Observation
from tiny import shared

HEADS, GROUP, DIM = 2, 3, 12
SCALE = DIM**-0.5


@dataclass(frozen=True, kw_only=True)
class Halves(Segment):
    """Tokens in fp16 without any span, with their positions; a segment that leaves everything to its base class."""

    heads: list[HeadKV]
    positions: list[Tensor]
    counts: list[Tensor] | None

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(k) for k, _ in self.heads)

    @property
    def log_counts(self) -> list[Tensor] | None:
        return self.counts

    def decode(self, dtype: torch.dtype) -> list[HeadKV]:
        return [(k.to(dtype), v.to(dtype)) for k, v in self.heads]


@dataclass(frozen=True)
class InHalves:
    """An encoder of `Halves`."""

    chunk_tokens: int = 1
    bound: bool = True

    def encode(self, tokens: KeptTokens) -> Segment:
        pairs = zip(tokens.keys, tokens.values, strict=True)
        return Halves(
            heads=[(k.half(), v.half()) for k, v in pairs],
            positions=[p.clone() for p in tokens.positions],
            counts=None if tokens.log_counts is None else [c.clone() for c in tokens.log_counts],
        )

    def bytes_bound(self, num_tokens: int, *, num_kv_heads: int, head_dim: int) -> int | None:
        return num_tokens * num_kv_heads * (2 * head_dim * 2 + 8) if self.bound else None


class Policy:
    """A recipe's policy in which some parts are replaced."""

    def __init__(self, recipe: str, **parts: Any) -> None:
        self.base = RecipePolicy(as_recipe(recipe))
        self.parts = parts

    def __getattr__(self, name: str) -> Any:
        return self.parts[name] if name in self.parts else getattr(self.base, name)


def cache_of(policy: Policy) -> steno.KVCache:
    cache = steno.KVCache(shared("llama").config)
    for layer in cache.own_layers:
        layer.policy = policy
    return cache


class Layer:
    """One layer under a policy, and the dense history of all that it ever saw."""

    def __init__(self, policy: Policy, rows: int = 1) -> None:
        self.cache: LayerCache = cache_of(policy).own_layers[1]
        self.keys, self.values = torch.zeros(rows, HEADS, 0, DIM), torch.zeros(rows, HEADS, 0, DIM)
        self.seed = 0

    def feed(self, count: int, new: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Queries and the layer's answer to them, `[B, H, T, D]`."""
        g = torch.Generator().manual_seed(self.seed)
        self.seed += 1
        rows = self.keys.shape[0]
        q = torch.randn(rows, HEADS * GROUP, count, DIM, generator=g)
        k, v = new or [torch.randn(rows, HEADS, count, DIM, generator=g) for _ in range(2)]
        self.keys, self.values = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        self.cache.update(k, v)
        out = self.cache.attend(q, None, scale=SCALE)
        self.cache.check_integrity()
        return q, out

    def answer(self, q: Tensor, kept: list[Tensor] | None = None, b: int = 0) -> Tensor:
        """The oracle for row b: each query sees what is kept of the prompt and all after it, up to its own position."""
        seen, count = self.keys.shape[2], q.shape[2]
        index = kept or [torch.arange(seen)] * HEADS
        out = torch.empty_like(q[b])
        for h in range(HEADS * GROUP):
            for t in range(count):
                i = index[h // GROUP]
                i = i[i <= seen - count + t]
                w = torch.softmax(self.keys[b, h // GROUP, i] @ q[b, h, t] * SCALE, 0)
                out[h, t] = w @ self.values[b, h // GROUP, i]
        return out

    def positions(self, b: int = 0) -> list[Tensor]:
        return self.cache.content.positions(b, self.cache.seen)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool(torch.allclose(a, b, atol=tolerance, rtol=tolerance))


ENCODED = ["full", "keydiff @ 20", "snapkv(window=4) | adakv @ 20"]


@pytest.mark.parametrize("chunk", [1, 64])
@pytest.mark.parametrize("steps", [[1, 1], [5, 1, 80], [1] * 70, [70, 1, 66, 1]])
@pytest.mark.parametrize("recipe", ENCODED)
def test_encoded_rows_answer_as_masked_attention(recipe: str, steps: list[int], chunk: int) -> None:
    layer = Layer(Policy(recipe, encoder=InHalves(chunk)))
    layer.feed(75)
    for count in steps:
        q, out = layer.feed(count)
        assert close(out[0], layer.answer(q, layer.positions()), 2e-3)
    segments = [s for s in layer.cache.content.rows[0].segments if isinstance(s, Halves)]
    assert (chunk == 64 and "@" in recipe) or segments
    for segment in segments:  # the encoder was told the true positions
        for h, ((k, _), where) in enumerate(zip(segment.heads, segment.positions, strict=True)):
            assert torch.equal(k, layer.keys[0, h, where].half())


@pytest.mark.parametrize("recipe", ENCODED)
def test_encoded_rows_of_a_batch_fork_and_reorder(recipe: str) -> None:
    layer = Layer(Policy(recipe, encoder=InHalves()), rows=2)
    layer.feed(75)
    for _ in range(70):
        layer.feed(1)
    layer.cache._select([1, 0, 1])
    layer.keys, layer.values = layer.keys[[1, 0, 1]], layer.values[[1, 0, 1]]
    q, out = layer.feed(3)
    for b in range(3):
        assert close(out[b], layer.answer(q, layer.positions(b), b), 2e-3)
    assert held_bytes(layer.cache.content) == layer.cache.measure()


@pytest.mark.parametrize("removed", [1, 64, 100])
def test_crop_into_an_encoded_segment(removed: int) -> None:
    layer = Layer(Policy("full", encoder=InHalves()))
    layer.feed(75)
    for _ in range(66):
        layer.feed(1)
    layer.cache.crop(-removed)
    layer.keys, layer.values = layer.keys[:, :, :-removed], layer.values[:, :, :-removed]
    assert layer.cache.held_tokens() == [[141 - removed] * HEADS]
    q, out = layer.feed(4)
    assert close(out[0], layer.answer(q), 2e-3)


def test_an_encoder_that_loses_tokens_is_found() -> None:
    class Loses(InHalves):
        def encode(self, tokens: KeptTokens) -> Segment:
            return super().encode(tokens).prefix([n - 1 for n in tokens.lengths], torch.float32)[0]

    with pytest.raises(IntegrityError, match="an encoder must hold"):
        Layer(Policy("full", encoder=Loses())).feed(9)


@pytest.mark.parametrize("room", [2000, 4000, 9000])
def test_a_byte_budget_of_an_encoder_holds(room: int) -> None:
    layer = Layer(bounded(room, True))
    layer.feed(75)
    assert room - 700 < layer.cache.measure() <= room  # a span table of four segments is allowed for
    with pytest.raises(BudgetError, match="cannot say how many bytes"):
        Layer(bounded(room, False)).feed(75)


def bounded(room: int, bound: bool) -> Policy:
    policy = Policy(f"keydiff @ {3 * room}B", encoder=InHalves(bound=bound))

    class Bounded(RecipePolicy):  # as a recipe with such a quantizer would be
        encoder = policy.parts["encoder"]

    policy.base = Bounded(policy.base.recipe)
    return policy


# counts


def merged(counts: Tensor, kept: Tensor) -> Any:
    """A `select` that keeps the entries of `kept` `[Hkv, S]`, which stand for `counts` `[Hkv, S]` tokens."""

    def select(kv: LayerKV, observation: Observation, allocation: None = None) -> Selection:
        index = [row.nonzero()[:, 0] for row in kept]
        return Selection(kv=kv, kept=index, log_counts=[c[i].log() for c, i in zip(counts, index, strict=True)])

    return select


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("steps", [[1, 1, 1], [3, 80, 1], [1] * 70, [600]])
@pytest.mark.parametrize(("recipe", "encoder"), [("full", None), ("int8", None), ("full", InHalves())])
def test_repeated_tokens_merge_without_loss(
    recipe: str, encoder: InHalves | None, steps: list[int], ragged: bool
) -> None:
    g = torch.Generator().manual_seed(3)
    distinct = torch.randn(2, HEADS, 150, DIM, generator=g)
    repeats = torch.randint(1, 4, (HEADS, 150), generator=g)
    repeats[:, -1] += 400 - repeats.sum(1)  # every head sees 400 tokens
    if not ragged:
        repeats[1] = repeats[0]
    index = torch.stack([torch.repeat_interleave(torch.arange(150), n) for n in repeats])  # [Hkv, 400]
    k, v = (torch.stack([x[h, index[h]] for h in range(HEADS)])[None] for x in distinct)
    first = torch.cat([torch.ones(HEADS, 1, dtype=torch.bool), index[:, 1:] != index[:, :-1]], dim=1)
    counts = torch.stack([repeats[h][index[h]] for h in range(HEADS)]).float()
    if ragged:  # one head keeps a repeated token twice
        twice = int((repeats[0] == 3).nonzero()[0])
        at = (index[0] == twice).nonzero()[:, 0]
        first[0, at[1]], counts[0, at[0]], counts[0, at[1]] = True, 2, 1
    policy = Policy(f"keydiff | {recipe} @ 40%" if recipe != "full" else "keydiff @ 40%", select=merged(counts, first))
    if encoder is not None:
        policy.parts["encoder"] = encoder
    layer = Layer(policy)
    layer.feed(400, (k, v))
    assert layer.cache.held_tokens() == [[150 + ragged, 150]]
    for count in steps:
        q, out = layer.feed(count)
        expected = layer.answer(q[:, :, -3:])  # the last queries see everything
        assert close(out[0, :, -3:], expected, 1e-4 if recipe == "full" and encoder is None else 0.03)


def test_segments_with_counts_stay_apart_and_keep_them() -> None:
    heads = [(torch.randn(n, DIM), torch.randn(n, DIM)) for n in (5, 3)]
    counts = [torch.rand(5), torch.rand(3)]
    counted, plain = DenseSegment.of(heads, log_counts=counts), DenseSegment.of(heads)
    assert counted.joined(plain) is None
    assert plain.joined(counted) is None
    assert plain.joined(plain) is None  # pages begin at multiples of 64 tokens
    whole = DenseSegment.of([(torch.randn(n, DIM), torch.randn(n, DIM)) for n in (64, 128)])
    assert whole.joined(plain).lengths == (69, 131)
    [cut] = counted.prefix([2, 3], torch.float32)
    assert [c.tolist() for c in cut.log_counts] == [counts[0][:2].tolist(), counts[1].tolist()]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("widths", [(DIM, DIM), (5, 9)])
def test_attend_heads_by_hand(widths: Sequence[int], softcap: float | None) -> None:
    lengths = (4, 0, 7)
    heads = [(torch.randn(n, widths[0]), torch.randn(n, widths[1])) for n in lengths]
    counts = [torch.rand(n) for n in lengths]
    q = torch.randn(6, 2, widths[0])
    out, lse = attend_heads(q, heads, scale=0.3, softcap=softcap, log_counts=counts)
    for h in range(6):
        keys, values = heads[h // 2]
        for t in range(2):
            logits = keys @ q[h, t] * 0.3
            logits = (softcap * torch.tanh(logits / softcap) if softcap else logits) + counts[h // 2]
            expected = torch.softmax(logits, 0) @ values
            assert close(out[h, t], expected, 1e-5)
            assert close(lse[h, t], logits.logsumexp(0) if len(logits) else torch.tensor(-torch.inf), 1e-5)


def test_a_merger_may_keep_other_entries() -> None:
    class Moves:
        id, counts_tokens = "moves", True

        def merge(self, kv: LayerKV, kept: Tensor, scores: Tensor, obs: Observation) -> Merged:
            assert scores.shape == kept.shape
            return Merged(kv=kv, kept=kept.roll(1, dims=1), counts=torch.full(kept.shape, 2.0))

    recipe = as_recipe("streaming_llm(n_sink=2) @ 10")
    base = RecipePolicy(recipe)
    object.__setattr__(recipe, "merge", Moves())
    object.__setattr__(recipe, "score", steno.recipe.as_recipe("keydiff @ 9").score)
    layer = Layer(Policy("full", **{name: getattr(base, name) for name in ("select", "budget_tokens")}))
    layer.feed(40)
    assert layer.cache.held_tokens() == [[10] * HEADS]
    [segment] = layer.cache.content.rows[0].segments
    assert all(torch.equal(c, torch.full((10,), 2.0).log()) for c in segment.log_counts)
    for (k, _), where in zip(segment.decode(torch.float32), layer.positions(), strict=True):
        assert k.shape == (10, DIM)
        assert len(where) == 10


# transforms


def test_a_constant_basis_is_one_group_and_counted_once() -> None:
    layer = Layer(Policy("hadamard"), rows=3)
    layer.feed(130)
    for _ in range(3):
        layer.feed(1)
    assert len(layer.cache.content._groups) == 2
    assert layer.cache.content._groups[1].rows == [0, 1, 2]
    plain = Layer(Policy("full"), rows=3)
    plain.feed(133)
    assert layer.cache.measure() < plain.cache.measure() + 3 * HEADS * 64 * 2 * DIM * 4 + DIM * DIM * 4 + 3000


@pytest.mark.parametrize("recipe", ["think | gear", "palu(key_share=0.25) | turboquant", "xkv | kvquant"])
def test_unequal_widths_need_plain_pages_and_are_refused_before_a_token_is_held(recipe: str) -> None:
    cache = steno.KVCache(shared("llama").config, recipe)
    one = torch.zeros(1, HEADS, 1, DIM)
    with pytest.raises(
        RecipeError, match=r"stores keys and values of one width, and .* leaves .* numbers a token: use"
    ):
        cache.own_layers[0].update(one, one)
    assert cache.kv_bytes == 0
