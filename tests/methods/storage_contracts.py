"""What every method must hold that stores, or chooses what a step reads: segments that attend as they decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from random_layers import make_layer, tensors
from torch import Tensor

from steno.cache.accounting import held_bytes, tensors_of
from steno.cache.segment import DenseSegment, Segment
from steno.kernels.attention import attend_heads
from steno.kernels.quant import decode_pages, encode_pages, page_bytes
from steno.methods import (
    Access,
    Encoder,
    Quantizer,
    Sharer,
    Transform,
)
from steno.types import PAGE_TOKENS, KeptTokens, Need, Widths


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
    widths = Widths(heads=heads, keys=dim, values=dim)
    stored = transform.stored(widths)
    assert {x.shape for x in changed.keys} == {(num_tokens, stored.keys)}
    assert {x.shape for x in changed.values} == {(num_tokens, stored.values)}
    assert len(changed.keys) == len(changed.values) == stored.heads
    assert held_bytes(segment) - held_bytes(inner) - held_bytes(basis) <= num_tokens * stored.beside + 2 * dim
    assert held_bytes(basis) <= transform.basis_bytes(widths, 1, kv.keys.element_size())
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
    """An index of any number of tokens of `dim` numbers has whole items, within its bytes; input unchanged, the same twice."""
    for num_tokens in (0, 1, 63, 64, 65, 130):
        keys, sentences = torch.randn(num_tokens, dim), torch.arange(num_tokens) // 5
        before = keys.clone()
        fixed, fixed_again = (access.fix([keys], 1, 4) if access.summarizes else None for _ in range(2))
        assert fixed is None or fixed.shape[0] == 1
        assert is_same(fixed, fixed_again)
        items, again = (access.summarize(keys, None if fixed is None else fixed[0], sentences) for _ in range(2))
        assert torch.equal(keys, before)
        assert torch.equal(items.vectors, again.vectors)
        assert is_same(items.lengths, again.lengths)
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


def is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Both missing, or equal."""
    return a is b if a is None or b is None else torch.equal(a, b)
