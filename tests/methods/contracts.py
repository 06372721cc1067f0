"""What every method must hold that chooses: tokens, layers, budgets. A class that is listed in a table is checked by these."""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from random_layers import layer_for, make_layer, tensors
from torch import Tensor

from steno import methods
from steno.methods import (
    Allocator,
    Attender,
    Evictor,
    Merger,
    Method,
    Propagator,
    Reader,
    Router,
    Scorer,
)
from steno.types import Need

NAMESPACE = {cls.__name__: cls for cls in methods.METHODS.values()}


def check_method(cls: type[Method]) -> None:
    """It says what it is, and `repr` rebuilds it."""
    method = cls()
    assert eval(repr(method), NAMESPACE) == method
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert cls.id.isidentifier()
    assert cls.kind in methods.KINDS
    assert cls.title
    assert cls.paper
    assert 2010 < cls.year < 2100
    assert all(isinstance(need, Need) for need in cls.needs)
    assert "." in cls.differs
    assert "\n" not in cls.differs


def check_scorer(scorer: Scorer, num_tokens: int, **kwargs: object) -> None:
    """Shape, no NaN, input unchanged, the same twice, protection within `min_tokens` or the budget."""
    kv, obs = layer_for(scorer, num_tokens, **kwargs)
    before = [t.clone() for t in tensors(kv) + tensors(obs)]
    scores = scorer.score(kv, obs)
    assert scores.shape == (kv.num_kv_heads, num_tokens)
    assert scores.dtype == torch.float32
    assert not scores.isnan().any()
    assert torch.equal(scores, scorer.score(kv, obs))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(kv) + tensors(obs), strict=True))
    protected = torch.isposinf(scores).sum(-1)
    assert (protected >= min(scorer.min_tokens, num_tokens)).all()
    assert (protected <= max(scorer.min_tokens, obs.budget_tokens)).all()
    assert (scorer.query_window > 0) == (Need.QUERIES in scorer.needs)


def check_evictor(evictor: Evictor, num_tokens: int, **kwargs: object) -> None:
    """`score` is the priority of the first state; a step keeps the shape and changes nothing of its input."""
    kv, obs = layer_for(evictor, num_tokens, **kwargs)
    state = evictor.prefill_state(kv, obs)
    positions = kv.positions.expand(kv.num_kv_heads, -1)
    assert torch.equal(evictor.priority(state, positions, obs.budget_tokens), evictor.score(kv, obs))
    assert obs.queries is not None
    weights = torch.rand(obs.queries.shape[0], num_tokens)
    before = state.clone(), weights.clone()
    after = evictor.observe(state, weights, step=1)
    assert after.shape == state.shape
    assert after.dtype == torch.float32
    assert not after.isnan().any()
    assert torch.equal(state, before[0])
    assert torch.equal(weights, before[1])
    assert evictor.needs_weights == (not torch.equal(after, state))


def check_reader(reader: Reader, num_tokens: int, **kwargs: object) -> None:
    """`score` is the retention of the whole prompt; the state of a token does not depend on those that come later."""
    kv, obs = layer_for(reader, num_tokens, **kwargs)
    state = reader.token_state(kv, obs)
    assert state.shape == (kv.num_kv_heads, num_tokens)
    assert state.dtype == torch.float32
    positions = kv.positions.expand(kv.num_kv_heads, -1)
    budget = obs.budget_tokens
    whole = reader.retention(kv.keys, state, positions, budget_tokens=budget, is_last=True)
    assert torch.equal(whole, reader.score(kv, obs))
    early = reader.retention(kv.keys, state, positions, budget_tokens=budget, is_last=False)
    assert early.shape == whole.shape
    assert not early.isnan().any()
    assert (torch.isposinf(early).sum(-1) <= max(budget, reader.min_tokens)).all()
    assert not (reader.needs - {Need.HIDDEN_STATES, Need.PRE_ROPE_KEYS, Need.PRE_ROPE_QUERIES})
    half = (num_tokens + 1) // 2
    first = dataclasses.replace(kv, keys=kv.keys[:, :half], values=kv.values[:, :half], positions=kv.positions[:half])
    assert obs.pre_rope_queries is not None
    assert obs.pre_rope_keys is not None
    assert obs.hidden_states is not None
    seen = dataclasses.replace(
        obs,
        pre_rope_queries=obs.pre_rope_queries[:, :half],
        pre_rope_keys=obs.pre_rope_keys[:, :half],
        hidden_states=obs.hidden_states[:half],
    )
    assert torch.allclose(reader.token_state(first, seen), state[:, :half], atol=1e-5)


def check_allocator(
    allocator: Allocator, scores: Tensor, *, budget: int, layer_idx: int = 0, num_layers: int = 4
) -> Tensor:
    """Whole counts of at most S; protected tokens fit whenever the budget holds them; input unchanged, the same twice."""
    before = scores.clone()
    counts, again = (
        allocator.allocate(scores, budget_tokens=budget, layer_idx=layer_idx, num_layers=num_layers) for _ in range(2)
    )
    assert torch.equal(scores, before)
    assert torch.equal(counts, again)
    assert counts.shape == scores.shape[:1]
    assert counts.dtype == torch.int64
    assert (counts >= 0).all()
    assert (counts <= scores.shape[1]).all()
    protected = torch.isposinf(scores).sum(-1)
    if budget >= int(protected.max()):
        assert (counts >= protected).all()
    return counts


def check_merger(merger: Merger, num_tokens: int, *, seed: int = 0, **kwargs: object) -> None:
    """Finite, input unchanged, the same twice, within the budget of each head; if all is kept, nothing changes."""
    kv, obs = make_layer(num_tokens, seed=seed, **kwargs)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(kv.num_kv_heads, num_tokens, generator=g)
    kept = scores > torch.rand(kv.num_kv_heads, 1, generator=g)
    kept[:, -1] = True
    before = [t.clone() for t in (*tensors(kv), *tensors(obs), scores, kept)]
    merged, again = (merger.merge(kv, kept, scores, obs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors(kv), *tensors(obs), scores, kept), strict=True))
    for x, like in ((merged.kv.keys, kv.keys), (merged.kv.values, kv.values), (merged.kept, kept)):
        assert (x.shape, x.dtype) == (like.shape, like.dtype)
    assert torch.equal(merged.kv.positions, kv.positions)
    assert torch.isfinite(merged.kv.keys).all()
    assert torch.isfinite(merged.kv.values).all()
    assert (merged.kept.sum(1) >= 1).all()
    assert (merged.kept.sum(1) <= kept.sum(1)).all()
    pairs = zip((*tensors(merged.kv), merged.kept), (*tensors(again.kv), again.kept), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    if merged.counts is not None:
        assert merger.counts_tokens
        assert (merged.counts.shape, merged.counts.dtype) == (kept.shape, torch.float32)
        assert (merged.counts[merged.kept] >= 1).all()
        assert torch.equal(merged.counts, again.counts)
        total = (merged.counts * merged.kept).sum(1)
        assert (total <= num_tokens * (1 + 1e-6)).all()
    whole = merger.merge(kv, torch.ones_like(kept), scores, obs)
    assert torch.equal(whole.kv.keys, kv.keys)
    assert torch.equal(whole.kv.values, kv.values)
    assert whole.kept.all()
    assert whole.counts is None or (whole.counts == 1).all()


def check_propagator(
    propagator: Propagator, num_tokens: int, *, is_image: Tensor, group: int, dim: int, seed: int = 0
) -> None:
    """Both choices: true positions, ascending, the last among them; input unchanged; the same twice."""
    kv, obs = make_layer(num_tokens, window=max(propagator.query_window, 1), group=group, dim=dim, seed=seed)
    kv = dataclasses.replace(kv, positions=2 * kv.positions)
    hidden = torch.randn(num_tokens, 16, generator=torch.Generator().manual_seed(seed))
    images = is_image if Need.IMAGE_MASK in propagator.needs else None
    before = [t.clone() for t in (*tensors(kv), *tensors(obs), hidden, is_image)]
    assert (propagator.query_window > 0) == (Need.QUERIES in propagator.needs)
    for layer_idx in range(obs.num_layers):
        seen = dataclasses.replace(obs, layer_idx=layer_idx)
        if not propagator.routes_layers:
            q = torch.randn(
                kv.num_kv_heads * group, num_tokens, kv.head_dim, generator=torch.Generator().manual_seed(1)
            )
            taking, same = (cast(Attender, propagator).within(kv, q, seen) for _ in range(2))
            assert (taking is None) == (same is None)
            if taking is not None and same is not None:
                assert torch.equal(taking, same)
                assert taking[-1] == num_tokens - 1
                assert (taking.diff() > 0).all()
            continue
        router = cast(Router, propagator)
        onward, again = (router.after(kv, seen) for _ in range(2))
        assert (onward is None) == (again is None)
        if onward is not None and again is not None:
            assert torch.equal(onward, again)
            assert onward.dtype == torch.int64
            assert torch.isin(onward, kv.positions).all()
            assert onward[-1] == kv.positions[-1]
            assert (onward.diff() > 0).all()
        route, same = (router.before(hidden, images, layer_idx=layer_idx, num_layers=obs.num_layers) for _ in range(2))
        if route is not None and same is not None:
            assert torch.equal(route.index, same.index)
            assert route.index.dtype == torch.int64
            assert (route.index.diff() > 0).all()
            assert 0 < len(route.index) <= num_tokens
            assert 0 <= int(route.index[0]) <= int(route.index[-1]) < num_tokens
            assert route.gates is None or route.gates.shape == route.index.shape
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors(kv), *tensors(obs), hidden, is_image), strict=True))
