"""Every listed method against the contract of its kind."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from contracts import (
    check_allocator,
    check_evictor,
    check_merger,
    check_method,
    check_propagator,
    check_reader,
    check_scorer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layers import with_weights
from safetensors.torch import save_file
from storage_contracts import check_access, check_encoder, check_quantizer, check_sharer, check_transform

from steno import methods
from steno.errors import BadArgument
from steno.methods import (
    ALLOCATORS,
    COMPOSITIONS,
    KINDS,
    METHODS,
    NAMED,
    READERS,
    SCORERS,
    Evictor,
    Reader,
    describe_methods,
)

SMALL: dict[str, dict[str, Any]] = {
    "snapkv": {"window": 3, "kernel": 3},
    "streaming_llm": {"n_sink": 2},
    "fastkv": {"window": 2, "kernel": 3},
    "expected_attention": {"n_sink": 2, "future_positions": 5},
    "kvzip": {"n_sink": 2},
    "locret": {"n_local": 2},
    "recency": {"n_sink": 2, "window": 1},
    "global_local": {"window": 3, "kernel": 3},
}


FULL_RANK: dict[str, dict[str, Any]] = {
    "think": {"ratio": 0.0},
    "palu": {"key_share": 1.0, "value_share": 1.0},
    "hadamard": {},
    "rotatekv": {},
    "minicache": {"retained": 1.0},
    "xkv": {"key_share": 1.0, "value_share": 1.0},
    "cskv": {"key_density": 1.0, "value_density": 1.0},
}
"""Arguments under which a transform or a sharer loses nothing."""
ENCODERS = [cls for cls in methods.QUANTIZERS.values() if cast(Any, cls)().page_format is None]


def small(cls: Any) -> Any:
    return cls(**SMALL.get(cls.id, {}))


@pytest.mark.parametrize("cls", METHODS.values(), ids=lambda cls: cls.id)
def test_method(cls: Any) -> None:
    check_method(cls)
    assert METHODS[cls.id] is cls


@pytest.mark.parametrize("cls", METHODS.values(), ids=lambda cls: cls.id)
def test_bad_values_are_named(cls: Any) -> None:
    for f in dataclasses.fields(cls):
        for bad in (None, [], b"x", -1, math.nan, math.inf, 10**400, "nonsense", 1j, ...):
            if bad is f.default or (f.default is None and isinstance(bad, str)):
                continue  # an optional file: None and any name are good
            with pytest.raises(BadArgument, match=f"`{f.name}`.*got {f.name}="):
                cls(**{f.name: bad})
        for bad in {True, 1.5} if isinstance(f.default, int) and not isinstance(f.default, bool) else ():
            with pytest.raises(BadArgument, match=f.name):
                cls(**{f.name: bad})


@pytest.mark.parametrize(("num_tokens", "group", "dim"), [(1, 1, 64), (3, 3, 80), (17, 8, 128), (64, 3, 8)])
@pytest.mark.parametrize("cls", methods.PROPAGATORS.values(), ids=lambda cls: cls.id)
def test_propagator(cls: Any, num_tokens: int, group: int, dim: int, tmp_path: Path) -> None:
    method = small(cls)
    if cls.trained:
        save_file({"router": torch.randn(4, 16, generator=torch.Generator().manual_seed(0))}, tmp_path / "router")
        method = dataclasses.replace(method, router=str(tmp_path / "router"))
    for is_image in (torch.arange(num_tokens) % 3 > 0, torch.zeros(num_tokens, dtype=torch.bool)):
        check_propagator(method, num_tokens, is_image=is_image, group=group, dim=dim)


@pytest.mark.parametrize("cls", SCORERS.values(), ids=lambda cls: cls.id)
@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.sampled_from([1, 2, 3, 4, 5, 17]),
    group=st.sampled_from([1, 3, 8]),
    hkv=st.integers(1, 3),
    dim=st.sampled_from([8, 64, 80, 128]),
    budget=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_scorer(cls: Any, num_tokens: int, group: int, hkv: int, dim: int, budget: int, dtype: torch.dtype) -> None:
    scorer = with_weights(small(cls), hkv=hkv, group=group, dim=dim)
    layer: dict[str, Any] = {"group": group, "hkv": hkv, "dim": dim, "budget": budget, "dtype": dtype}
    check_scorer(scorer, num_tokens, **layer)
    if cls.id in READERS:
        check_reader(cast(Reader, scorer), num_tokens, **layer)
    if cls.evicts_while_decoding:
        check_evictor(cast(Evictor, scorer), num_tokens, **layer)


@pytest.mark.parametrize("cls", ALLOCATORS.values(), ids=lambda cls: cls.id)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    hkv=st.integers(1, 4),
    num_tokens=st.integers(1, 20),
    budget=st.integers(1, 24),
    window=st.integers(0, 4),
    num_layers=st.integers(1, 4),
    levels=st.integers(1, 50),
)
def test_allocator(
    cls: Any, seed: int, hkv: int, num_tokens: int, budget: int, window: int, num_layers: int, levels: int
) -> None:
    scores = torch.randint(levels, (hkv, num_tokens), generator=torch.Generator().manual_seed(seed)).float()
    scores[:, num_tokens - min(window, num_tokens) :] = torch.inf
    for layer_idx in range(num_layers):
        allocator = with_weights(cls(), layers=num_layers, hkv=hkv)
        counts = check_allocator(allocator, scores, budget=budget, layer_idx=layer_idx, num_layers=num_layers)
        if cls.id not in (
            "pyramidkv",
            "prefixkv",
            "razorattention",
            "zipvl",
        ):  # they have tests of their own for the sum
            assert int(counts.sum()) == min(budget, num_tokens) * hkv


@pytest.mark.parametrize("cls", methods.MERGERS.values(), ids=lambda cls: cls.id)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    hkv=st.integers(1, 3),
    group=st.sampled_from([1, 3, 8]),
    dim=st.sampled_from([8, 64, 80, 128]),
    num_tokens=st.integers(1, 33),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_merger(cls: Any, seed: int, hkv: int, group: int, dim: int, num_tokens: int, dtype: torch.dtype) -> None:
    check_merger(cls(), num_tokens, seed=seed, hkv=hkv, group=group, dim=dim, dtype=dtype)


SHAPES = [(1, 64, 1, 1), (33, 80, 2, 3), (70, 128, 4, 8)]


@pytest.mark.parametrize(("num_tokens", "dim", "hkv", "group"), [*SHAPES, (170, 16, 3, 3)])
@pytest.mark.parametrize("is_whole", [False, True], ids=["as_is", "lossless"])
@pytest.mark.parametrize("cls", methods.SHARERS.values(), ids=lambda cls: cls.id)
def test_sharer(cls: Any, is_whole: bool, num_tokens: int, dim: int, hkv: int, group: int) -> None:
    sharer = cls(**FULL_RANK[cls.id]) if is_whole else small(cls)
    check_sharer(sharer, num_tokens, 2, is_lossless=is_whole, dim=dim, hkv=hkv, group=group)


@pytest.mark.parametrize(("num_tokens", "dim", "hkv", "group"), SHAPES)
@pytest.mark.parametrize("is_whole", [False, True], ids=["as_is", "full_rank"])
@pytest.mark.parametrize("cls", methods.TRANSFORMS.values(), ids=lambda cls: cls.id)
def test_transform(cls: Any, is_whole: bool, num_tokens: int, dim: int, hkv: int, group: int) -> None:
    transform = cls(**FULL_RANK[cls.id]) if is_whole else small(cls)
    check_transform(transform, num_tokens, is_lossless=is_whole, dim=dim, hkv=hkv, group=group)


@pytest.mark.parametrize("dim", [48, 64, 80, 128])
@pytest.mark.parametrize("cls", methods.QUANTIZERS.values(), ids=lambda cls: cls.id)
def test_quantizer(cls: Any, dim: int) -> None:
    check_quantizer(cls(), dim)


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "tail"])
@pytest.mark.parametrize(("lengths", "dim", "group"), [([1], 64, 1), ([64, 64], 80, 3), ([130, 7, 0], 128, 8)])
@pytest.mark.parametrize("cls", ENCODERS, ids=lambda cls: cls.id)
def test_encoder(cls: Any, lengths: list[int], dim: int, group: int, prompt: bool) -> None:
    encoder = with_weights(small(cls), hkv=len(lengths), group=group, dim=dim)
    check_encoder(encoder, lengths, dim, group=group, prompt=prompt)


@pytest.mark.parametrize("dim", [8, 64, 80, 128])
@pytest.mark.parametrize("cls", methods.ACCESSORS.values(), ids=lambda cls: cls.id)
def test_access(cls: Any, dim: int) -> None:
    check_access(cls(), dim)


def test_describe_methods_is_json() -> None:
    rows = json.loads(json.dumps(describe_methods()))
    assert [row["id"] for row in rows] == [*METHODS, *NAMED, *COMPOSITIONS]
    assert set(rows[0]) == {
        "id", "kind", "title", "paper", "year", "arxiv", "needs", "frees_memory", "trained", "differs", "parameters"
    }  # fmt: skip
    assert [row["kind"] for row in rows] == sorted((row["kind"] for row in rows), key=[*KINDS, "recipe"].index)
