"""What every method of a kind must hold. A class that is listed in a table is checked by these."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from steno import methods
from steno.methods import Access, Allocator, Evictor, Merger, Method, Quantizer, Scorer
from steno.types import PAGE_TOKENS, LayerKV, Need, Observation, Rope

NAMESPACE = {cls.__name__: cls for cls in methods.METHODS.values()}


def make_layer(
    num_tokens: int, *, hkv: int = 2, group: int = 3, dim: int = 8, window: int = 4, budget: int = 6,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[LayerKV, Observation]:  # fmt: skip
    """A random layer and everything that a host could have seen of it."""
    g = torch.Generator().manual_seed(seed)
    heads = hkv * group

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    root = draw(heads, dim, dim) / 4
    kv = LayerKV(
        keys=draw(hkv, num_tokens, dim).to(dtype),
        values=draw(hkv, num_tokens, dim).to(dtype),
        positions=torch.arange(num_tokens),
    )
    obs = Observation(
        layer_idx=1,
        num_layers=4,
        scaling=dim**-0.5,
        budget_tokens=budget,
        rope=Rope(inv_freq=10000.0 ** (-torch.arange(0, dim, 2) / dim)),
        queries=draw(heads, min(window, num_tokens), dim).to(dtype),
        query_mean=draw(heads, dim),
        query_cov=root @ root.mT,
        attention_mass=draw(heads, num_tokens).abs(),
        replay_mass=draw(hkv, num_tokens).abs(),
    )
    return kv, obs


def layer_for(scorer: Scorer, num_tokens: int, **kwargs: object) -> tuple[LayerKV, Observation]:
    """`make_layer` with the query window that the scorer asks for."""
    return make_layer(num_tokens, window=max(scorer.query_window, 1), **kwargs)  # type: ignore[arg-type]


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
    after = evictor.observe(state, weights)
    assert after.shape == state.shape
    assert after.dtype == torch.float32
    assert not after.isnan().any()
    assert torch.equal(state, before[0])
    assert torch.equal(weights, before[1])
    assert evictor.needs_weights == (not torch.equal(after, state))


def check_allocator(
    allocator: Allocator, scores: Tensor, *, budget: int, layer_idx: int = 0, num_layers: int = 4
) -> Tensor:
    """Whole counts of at most S; protected tokens fit whenever the budget holds them; the input is not changed."""
    before = scores.clone()
    counts = allocator.allocate(scores, budget_tokens=budget, layer_idx=layer_idx, num_layers=num_layers)
    assert torch.equal(scores, before)
    assert counts.shape == scores.shape[:1]
    assert counts.dtype == torch.int64
    assert (counts >= 0).all()
    assert (counts <= scores.shape[1]).all()
    protected = torch.isposinf(scores).sum(-1)
    if budget >= int(protected.max()):
        assert (counts >= protected).all()
    return counts


def check_merger(merger: Merger) -> None:
    """The kept tokens stay where they are."""
    kv, _ = make_layer(7)
    merged = merger.merge(kv, torch.ones(2, 7, dtype=torch.bool))
    assert torch.equal(merged.keys, kv.keys)
    assert torch.equal(merged.values, kv.values)


def check_quantizer(quantizer: Quantizer) -> None:
    """Groups divide a page, and the tail closes at page borders."""
    page = quantizer.page_format
    assert page.bits in (2, 4, 8)
    assert PAGE_TOKENS % page.key_group == 0
    assert quantizer.residual_tokens > 0
    assert quantizer.residual_tokens % PAGE_TOKENS == 0


def check_access(access: Access) -> None:
    """A step never reads more pages than there are, and always some."""
    for held in (1, 63, 64, 65, 5000):
        total = -(-held // PAGE_TOKENS)
        assert 1 <= access.num_pages(held) <= total
        assert not access.reads_all or access.num_pages(held) == total
    low = torch.randn(2, 5, 8)
    bounds = access.page_bounds(torch.randn(6, 8), low, low + 1)
    assert bounds.shape == (2, 5)
    assert bounds.dtype == torch.float32


def tensors(bundle: LayerKV | Observation) -> list[Tensor]:
    """The tensors of a bundle."""
    return [v for f in dataclasses.fields(bundle) if isinstance(v := getattr(bundle, f.name), Tensor)]
