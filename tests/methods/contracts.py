"""What every method of a kind must hold. A class that is listed in a table is checked by these."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from steno import methods, pipeline
from steno.cache.accounting import held_bytes, tensors_of
from steno.cache.segment import DenseSegment, Segment
from steno.calibration import save_calibration
from steno.kernels.attention import attend_heads
from steno.kernels.quant import decode_pages, encode_pages, page_bytes
from steno.methods import (
    Access,
    Allocator,
    Attender,
    Encoder,
    Evictor,
    Merger,
    Method,
    Propagator,
    Quantizer,
    Reader,
    Router,
    Scorer,
    Sharer,
    Transform,
)
from steno.methods.quantize.commvq import CENTRES, num_stages
from steno.recipe import Recipe, parse_recipe
from steno.types import PAGE_TOKENS, KeptTokens, LayerKV, Need, Observation, Rope

FOLDER = tempfile.TemporaryDirectory()
NAMESPACE = {cls.__name__: cls for cls in methods.METHODS.values()}

WIDTH, INNER, LAYERS = 5, 6, 4
LEARNED: dict[str, Callable[[int, int, int, int], dict[str, tuple[int, ...]]]] = {
    "locret": lambda layers, hkv, group, dim: {
        "w1": (layers, INNER, (group + 2) * hkv * dim), "w2": (layers, hkv, INNER),
    },
    "trim_kv": lambda layers, hkv, group, dim: {
        "w1": (layers, INNER, WIDTH), "b1": (layers, INNER), "w2": (layers, hkv, INNER), "bias": (layers, hkv),
    },
    "prefixkv": lambda layers, hkv, group, dim: {"curves": (layers, 101)},
    "commvq": lambda layers, hkv, group, dim: {
        "key_centres": (layers, hkv, num_stages(dim, 2), CENTRES, dim),
        "value_rows_2": (layers, hkv, 2 * dim + 1, dim), "value_rows_1": (layers, hkv, dim + 1, dim),
    },
    "razorattention": lambda layers, hkv, group, dim: {"induction": (layers, hkv), "echo": (layers, hkv)},
}  # fmt: skip
"""Shapes of what a method learns of a layer of `make_layer`."""


@cache
def learned_file(method_id: str, layers: int, hkv: int, group: int, dim: int) -> str:
    """A file with random weights for a method, in a folder that goes with the process."""
    g = torch.Generator().manual_seed(0)
    shapes = LEARNED[method_id](layers, hkv, group, dim)
    place = Path(FOLDER.name) / f"{method_id}-{layers}-{hkv}-{group}-{dim}.safetensors"
    save_calibration(place, {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}, {})
    return str(place)


def with_weights(method: Any, *, layers: int = LAYERS, hkv: int = 2, group: int = 3, dim: int = 8) -> Any:
    """The method with what it learned of layers of this shape, if it learns."""
    if method.id not in LEARNED:
        return method
    return dataclasses.replace(method, weights=learned_file(method.id, layers, hkv, group, dim))


def with_files(recipe: str, *, layers: int, hkv: int, group: int = 2, dim: int) -> Recipe:
    """The recipe, with random weights of a model of this shape for the stages that learn."""
    return pipeline.with_weights(
        parse_recipe(recipe), lambda method_id, command: learned_file(method_id, layers, hkv, group, dim)
    )


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
        pre_rope_queries=draw(heads, num_tokens, dim).to(dtype),
        pre_rope_keys=draw(hkv, num_tokens, dim).to(dtype),
        hidden_states=draw(num_tokens, WIDTH).to(dtype),
        replay_mass=draw(hkv, num_tokens).abs(),
        image_mask=draw(num_tokens) > 0,
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


def check_transform(transform: Transform, num_tokens: int, *, is_lossless: bool, **kwargs: object) -> None:
    """Shape, finite, input unchanged, the same twice, bytes within the bound; a segment in the basis attends as it decodes.

    is_lossless: a basis of full rank, which must give back what it was given.
    """
    kv, obs = make_layer(num_tokens, window=64, **kwargs)  # type: ignore[arg-type]
    heads, dim = kv.num_kv_heads, kv.head_dim
    tokens = KeptTokens(
        keys=list(kv.keys),
        values=list(kv.values),
        positions=[kv.positions] * heads,
        layer_idx=1,
        num_layers=4,
        rope=obs.rope if Need.ROPE in transform.needs else None,
        observation=obs,
    )
    before = [t.clone() for t in (*tensors(kv), *tensors(obs))]
    basis, again = transform.fit(tokens), transform.fit(tokens)
    changed = basis.change(tokens)
    inner = DenseSegment.of(list(zip(changed.keys, changed.values, strict=True)))
    segment = basis.wrap(inner, tokens)
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors(kv), *tensors(obs)), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(changed.keys, again.change(tokens).keys, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(changed.values, again.change(tokens).values, strict=True))
    assert held_bytes(basis) <= transform.basis_bytes(heads, dim, 1)
    assert segment.lengths == tokens.lengths
    decoded = segment.decode(torch.float32)
    for (k, v), plain_k, plain_v in zip(decoded, kv.keys, kv.values, strict=True):
        assert k.shape == v.shape == (num_tokens, dim)
        assert torch.isfinite(k).all()
        assert torch.isfinite(v).all()
        if is_lossless:
            assert torch.allclose(k, plain_k, atol=1e-4)
            assert torch.allclose(v, plain_v, atol=1e-4)
    group = int(kwargs.get("group", 3))  # type: ignore[call-overload]
    q = torch.randn(heads * group, 2, dim, generator=torch.Generator().manual_seed(1))
    for softcap in (None, 5.0):
        out, lse = segment.attend(q, dim**-0.5, softcap)
        expected, expected_lse = attend_heads(q, decoded, scale=dim**-0.5, softcap=softcap)
        assert torch.allclose(out, expected, atol=1e-4)
        assert torch.allclose(lse, expected_lse, atol=1e-4)
    [part] = segment.prefix([num_tokens // 2 + 1] * heads, torch.float32)
    for (k, v), (whole_k, whole_v) in zip(part.decode(torch.float32), decoded, strict=True):
        assert torch.allclose(k, whole_k[: len(k)], atol=1e-6)
        assert torch.allclose(v, whole_v[: len(v)], atol=1e-6)


class DenseStore:
    """Stores tokens as they are."""

    chunk_tokens = 1

    def store(self, tokens: KeptTokens) -> Segment:
        return DenseSegment.of(list(zip(tokens.keys, tokens.values, strict=True)))


def check_sharer(sharer: Sharer, num_tokens: int, num_layers: int, *, is_lossless: bool, **kwargs: object) -> None:
    """Groups are a partition into neighbours; shapes, finite, input unchanged, the same twice; attends as it decodes.

    is_lossless: arguments under which nothing is lost.
    """
    groups = {tuple(sharer.group(i, 9)) for i in range(9)}
    assert sorted(i for group in groups for i in group) == list(range(9))
    assert all(i in sharer.group(i, 9) for i in range(9))
    layers = []
    for i in range(num_layers):
        kv, obs = make_layer(num_tokens, seed=i, **kwargs)  # type: ignore[arg-type]
        tokens = KeptTokens(
            keys=list(kv.keys),
            values=list(kv.values),
            positions=[kv.positions + 3] * kv.num_kv_heads,
            layer_idx=i,
            num_layers=num_layers,
            rope=obs.rope if Need.ROPE in sharer.needs else None,
            observation=obs,
        )
        layers.append(tokens)

    store = DenseStore()
    inputs = [x for tokens in layers for x in (*tokens.keys, *tokens.values, *tokens.positions)]
    before = [x.clone() for x in inputs]
    segments, again = sharer.share(layers, store), sharer.share(layers, store)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))
    assert len(segments) == num_layers
    group = int(kwargs.get("group", 3))  # type: ignore[call-overload]
    mine = {x.untyped_storage().data_ptr() for x in inputs}
    assert not mine & {x.untyped_storage().data_ptr() for x in tensors_of(segments) if x.numel()}
    assert held_bytes(segments) <= sum(held_bytes(segment) for segment in segments)
    for tokens, segment, other in zip(layers, segments, again, strict=True):
        heads, dim = len(tokens.keys), tokens.keys[0].shape[1]
        assert segment.lengths == tokens.lengths
        decoded = segment.decode(torch.float32)
        pairs = zip(decoded, other.decode(torch.float32), tokens.keys, tokens.values, strict=True)
        for (k, v), (k2, v2), plain_k, plain_v in pairs:
            assert k.shape == v.shape == (num_tokens, dim)
            assert torch.isfinite(k).all()
            assert torch.isfinite(v).all()
            assert torch.equal(k, k2)
            assert torch.equal(v, v2)
            if is_lossless:
                assert torch.allclose(k, plain_k, atol=1e-4)
                assert torch.allclose(v, plain_v, atol=1e-4)
        q = torch.randn(heads * group, 2, dim, generator=torch.Generator().manual_seed(1))
        out, lse = segment.attend(q, dim**-0.5, 5.0)
        expected, expected_lse = attend_heads(q, decoded, scale=dim**-0.5, softcap=5.0)
        assert torch.allclose(out, expected, atol=1e-4)
        assert torch.allclose(lse, expected_lse, atol=1e-4)


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


def check_quantizer(quantizer: Quantizer, dim: int) -> None:
    """Pages of the format hold tokens of `dim` numbers, the tail closes at page borders, or at those of an encoder's chunks."""
    page = quantizer.page_format
    assert quantizer.residual_tokens > 0
    if page is None:
        assert quantizer.residual_tokens % cast(Encoder, quantizer).chunk_tokens == 0
        return
    keys = torch.randn(2, 2, PAGE_TOKENS, dim, generator=torch.Generator().manual_seed(0))
    before = keys.clone()
    pages, again = (encode_pages(keys, keys.flip(1), page) for _ in range(2))
    assert torch.equal(keys, before)
    assert all(torch.equal(a, b) for a, b in zip(pages.tensors, again.tensors, strict=True))
    assert pages.nbytes == sum(x.nbytes for x in pages.tensors) == 4 * page_bytes(page, dim)
    decoded = decode_pages(pages)[0].reshape(keys.shape)
    assert (decoded - keys).square().mean() < 0.5
    assert quantizer.residual_tokens % PAGE_TOKENS == 0


def check_encoder(
    encoder: Encoder, lengths: Sequence[int], dim: int, *, group: int, prompt: bool, seed: int = 0
) -> None:
    """Shape, finite, input unchanged, nothing of it shared, the same twice, within the bound of bytes; attends as it decodes.

    lengths: of each KV head; chunks of the encoder are rounded up to.
    """
    g = torch.Generator().manual_seed(seed)
    chunk = encoder.chunk_tokens
    lengths = [-(-n // chunk) * chunk for n in lengths]
    longest, heads = max(lengths), len(lengths)
    kv, obs = make_layer(2 * longest, hkv=heads, group=group, dim=dim, window=64, seed=seed)
    positions = [torch.randperm(2 * longest, generator=g)[:n].sort().values for n in lengths]
    for counted in (False, True):
        tokens = KeptTokens(
            keys=[kv.keys[h, p] for h, p in enumerate(positions)],
            values=[kv.values[h, p] for h, p in enumerate(positions)],
            positions=positions,
            log_counts=[torch.rand(n, generator=g) for n in lengths] if counted else None,
            layer_idx=1,
            num_layers=4,
            rope=obs.rope if Need.ROPE in encoder.needs else None,
            observation=obs if prompt else None,
        )
        inputs = [*tokens.keys, *tokens.values, *tokens.positions, *(tokens.log_counts or [])]
        before = [x.clone() for x in inputs]
        segment, again = encoder.encode(tokens), encoder.encode(tokens)
        assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))
        mine = {x.untyped_storage().data_ptr() for x in inputs}
        assert not mine & {x.untyped_storage().data_ptr() for x in tensors_of(segment) if x.numel()}
        assert segment.lengths == tuple(lengths)
        decoded = segment.decode(torch.float32)
        for (k, v), (k2, v2), n in zip(decoded, again.decode(torch.float32), lengths, strict=True):
            assert k.shape == v.shape == (n, dim)
            assert torch.isfinite(k).all()
            assert torch.isfinite(v).all()
            assert torch.equal(k, k2)
            assert torch.equal(v, v2)
        q = torch.randn(heads * group, 2, dim, generator=g)
        out, lse = segment.attend(q, dim**-0.5)
        expected, expected_lse = attend_heads(q, decoded, scale=dim**-0.5, log_counts=tokens.log_counts)
        assert torch.allclose(out, expected, atol=1e-3, rtol=1e-3)
        assert torch.allclose(lse, expected_lse, atol=1e-3, rtol=1e-3)
        bound = encoder.bytes_bound(sum(lengths) // heads, num_kv_heads=heads, head_dim=dim)
        if bound is not None and sum(lengths) % heads == 0:
            counts = 4 * sum(lengths) if counted else 0
            assert held_bytes(segment) <= bound + counts
        for shorter in ([n // 2 for n in lengths], [0] * heads):
            parts = segment.prefix(shorter, torch.float32)
            assert [sum(part.lengths[h] for part in parts) for h in range(heads)] == shorter


def check_access(access: Access, dim: int) -> None:
    """An index of any number of tokens of `dim` numbers has whole items, within the bytes it claims; its input is unchanged."""
    for num_tokens in (0, 1, 63, 64, 65, 130):
        keys, sentences = torch.randn(num_tokens, dim), torch.arange(num_tokens) // 5
        fixed = access.fix([keys], 1, 4) if access.summarizes else None
        assert fixed is None or fixed.shape[0] == 1
        before = keys.clone()
        items = access.summarize(keys, None if fixed is None else fixed[0], sentences)
        assert torch.equal(keys, before)
        assert items.vectors.ndim == 2
        assert len(items.vectors) <= num_tokens
        assert torch.isfinite(items.vectors).all()
        assert bool(items.vectors.numel()) == (access.summarizes and num_tokens > 0)
        if items.lengths is not None:
            assert items.lengths.dtype == torch.int32
            assert int(items.lengths.sum()) == num_tokens
        per_token, once = access.index_bytes(dim, 4)
        held = [items.vectors, *(x for x in (items.lengths, fixed) if x is not None)]
        assert sum(x.numel() * x.element_size() for x in held) <= per_token * num_tokens + once
    assert not access.reads_all or access.reads_layer(1, 4)


def tensors(bundle: LayerKV | Observation) -> list[Tensor]:
    """The tensors of a bundle."""
    return [v for f in dataclasses.fields(bundle) if isinstance(v := getattr(bundle, f.name), Tensor)]
