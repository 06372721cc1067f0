"""Segments without spans, within one another: what they answer, and that a step never opens a whole one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from random_layers import with_files
from torch import Tensor
from transformers import LlamaConfig

import steno
from steno.cache.latent import LatentBasis
from steno.cache.segment import Segment
from steno.kernels.attention import attend_heads
from steno.kernels.quant.matrices import Matrices
from steno.kernels.quant.sides import PageSide
from steno.methods import QUANTIZERS, TRANSFORMS
from steno.types import PAGE_TOKENS
from tiny import SHARED

NO_FILE = [name for name in QUANTIZERS if name not in ("commvq", "vidkv_stp")]
"""The codebooks of `commvq` are those of whole heads, `vidkv_stp` looks at images."""
FORMS = ["int4", "int8", "fp8", *(name for name in NO_FILE if QUANTIZERS[name]().page_format is None)]
ONE_WIDTH = [name for name in TRANSFORMS if name != "think"]
AROUND = [*ONE_WIDTH, "palu | hadamard", "minicache(start=0.0)", "minicache(start=0.0) | hadamard",
          "xkv(key_share=0.2, value_share=0.2)"]  # fmt: skip
UNEQUAL = ["think | int4", "think | fp8", "palu(key_share=0.3) | int4", "palu(key_share=0.3) | fp8", "palu(key_share=0.3)",
           "xkv | int4", "cskv(value_density=0.25) | hadamard | int8"]  # fmt: skip
RECIPES = [f"{around} | {form}" for around in AROUND for form in FORMS] + FORMS + UNEQUAL + ["commvq"]
SCALE = 0.2


def read(recipe: str, num_tokens: int, *, dim: int = 16, group: int = 3, seed: int = 0) -> steno.KVCache:
    """A cache of two layers that has read so many random tokens."""
    config = LlamaConfig(**{**SHARED, "head_dim": dim, "num_attention_heads": 2 * group, "num_hidden_layers": 2})
    cache = steno.KVCache(config, with_files(recipe, layers=2, hkv=2, group=group, dim=dim))
    feed(cache, num_tokens, dim=dim, group=group, seed=seed)
    return cache


def feed(cache: steno.KVCache, num_tokens: int, *, dim: int, group: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for layer in cache.own_layers:
        q, k, v = (torch.randn(1, heads, num_tokens, dim, generator=g) for heads in (2 * group, 2, 2))
        layer.update(k, v)
        layer.attend(q, None, scale=SCALE)


def segments(cache: steno.KVCache) -> Iterator[Segment]:
    return chain.from_iterable(layer.content.rows[0].segments for layer in cache.own_layers)


@pytest.mark.parametrize(("num_tokens", "dim", "group", "softcap"), [(131, 40, 1, None), (300, 16, 3, 5.0)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_segment_attends_as_the_tokens_that_it_decodes_to(
    recipe: str, num_tokens: int, dim: int, group: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steno.cache.latent.TILE_TOKENS", PAGE_TOKENS)
    cache = read(recipe, num_tokens, dim=dim, group=group)
    q = torch.randn(2 * group, 2, dim, generator=torch.Generator().manual_seed(1))
    held = list(segments(cache))
    assert held
    for segment in held:
        right, right_lse = attend_heads(
            q.double(), segment.decode(torch.float64), scale=SCALE, softcap=softcap, log_counts=segment.log_counts
        )
        for x, tolerance in ((q.double(), 1e-5), (q, 5e-3)):  # native products of whole numbers round to 14 bits
            out, lse = segment.attend(x, SCALE, softcap)
            assert out.dtype == x.dtype
            torch.testing.assert_close(out.double(), right, atol=tolerance, rtol=0)
            torch.testing.assert_close(lse, right_lse, atol=tolerance, rtol=0)


def test_heads_of_unlike_lengths_and_many_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    [_, *rest] = held = list(segments(read("keydiff | adakv | chelsea | gear @ 200", 300)))
    q = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(1))
    at_once = [segment.attend(q, SCALE) for segment in held]
    assert rest
    monkeypatch.setattr("steno.cache.segment.MAX_LOGITS", 2 * 6 * 200)
    for segment, (out, lse) in zip(held, at_once, strict=True):
        right, right_lse = attend_heads(q, segment.decode(torch.float32), scale=SCALE, log_counts=segment.log_counts)
        some, some_lse = segment.attend(q, SCALE)
        for a, b in ((out, right), (some, right), (lse, right_lse), (some_lse, right_lse)):
            torch.testing.assert_close(a, b, atol=5e-3, rtol=0)


# what a step opens


def every_class(root: type) -> Iterator[type]:
    yield root
    for cls in root.__subclasses__():
        yield from every_class(cls)


def classes_of(value: object) -> set[type]:
    """The classes of a segment and of all that it consists of."""
    if isinstance(value, (tuple, list)):
        return set().union(*map(classes_of, value))
    fields = getattr(value, "__dataclass_fields__", {})
    return {type(value)}.union(*(classes_of(getattr(value, name)) for name in fields)) if fields else set()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_opens_no_more_than_a_tile(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steno.cache.latent.TILE_TOKENS", 2 * PAGE_TOKENS)
    cache = read(recipe, 1100)
    found = set().union(*(classes_of(segment) for segment in segments(cache)))
    opened: list[int] = []

    def whole(*_: object) -> None:
        raise AssertionError("a whole segment was opened")

    for cls in found | set(every_class(Segment)):
        if issubclass(cls, Segment) or (hasattr(cls, "keys_between") and hasattr(cls, "decode")):
            monkeypatch.setattr(cls, "decode", whole)
    for cls in (Matrices, PageSide):
        plain = cls.decode

        def counted(self: Matrices | PageSide, dtype: torch.dtype = torch.float32, plain: object = plain) -> Tensor:
            opened.append(len(self.codes) * PAGE_TOKENS)
            return plain(self, dtype)  # type: ignore[operator]

        monkeypatch.setattr(cls, "decode", counted)
    for cls in found:
        if issubclass(cls, LatentBasis):
            restore = cls.whole_keys

            def restored(self: LatentBasis, latents: Tensor, restore: object = restore) -> Tensor:
                opened.append(latents.shape[1])
                return restore(self, latents)  # type: ignore[operator]

            monkeypatch.setattr(cls, "whole_keys", restored)
    for _ in range(2):
        feed(cache, 1, dim=16, group=3, seed=2)
    assert max(opened, default=0) <= 1024
