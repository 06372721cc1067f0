"""Arrays as chunks: any numbers, any lengths of heads, to the bit; and no more bytes than they had."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steno.codec.arrays import ArrayDecoder, ArrayEncoder, ArraySpec
from steno.codec.planes import DTYPES, join_planes, num_planes, split_planes
from steno.codec.tables import RAW, Tables
from steno.errors import BadArgument, DamagedFile


def random_bits(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    """Any bits at all: NaN, infinities, subnormals."""
    data = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] * num_planes(dtype)), np.uint8)
    x = torch.from_numpy(data)
    return x.view(DTYPES[dtype]) if x.numel() else torch.empty(shape, dtype=DTYPES[dtype])


def bits(x: torch.Tensor) -> bytes:
    return b"" if not x.numel() else x.contiguous().view(torch.uint8).numpy().tobytes()


def round_trip(x: torch.Tensor, spec: ArraySpec) -> tuple[torch.Tensor, int]:
    """What comes back, and the bytes of chunks and tables between."""
    encoder = ArrayEncoder(x, spec)
    stored, found = [table.to_bytes() for table in encoder.tables], []
    for table, data in zip(encoder.tables, stored, strict=True):
        back, end = Tables.from_bytes(np.frombuffer(data, np.uint8), spec.num_contexts, len(table.frequencies))
        assert end == len(data)
        found.append(back)
    decoder, total = ArrayDecoder(spec, found), sum(map(len, stored))
    for i in range(spec.num_chunks):
        data = encoder.chunk(i)
        total += len(data)
        assert decoder.feed(i, np.frombuffer(b"xy" + data, np.uint8), 2) == len(data) + 2
    return decoder.tensor(), total


@pytest.mark.parametrize("dtype", DTYPES)
def test_planes_are_the_bits(dtype: str) -> None:
    x = random_bits((7, 12), dtype, 0)
    planes = split_planes(x)
    assert len(planes) == num_planes(dtype)
    assert bits(join_planes(planes, dtype)) == bits(x)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    lengths=st.lists(st.sampled_from([0, 1, 5, 256, 257, 700, 3000]), min_size=1, max_size=3),
    columns=st.sampled_from([1, 4, 6]),
    row_tokens=st.sampled_from([0, 1, 64]),
    per_context=st.booleans(),
    is_noise=st.booleans(),
    seed=st.integers(0, 99),
)
def test_arrays_come_back_to_the_bit(dtype, lengths, columns, row_tokens, per_context, is_noise, seed) -> None:
    offsets = (0, *np.cumsum(lengths).tolist())
    spec = ArraySpec(
        dtype=dtype, columns=columns, offsets=offsets, row_tokens=row_tokens, context_columns=1 if per_context else columns
    )  # fmt: skip
    x = random_bits((offsets[-1], columns), dtype, seed)
    if not is_noise:
        scale = torch.tensor([3.0**i for i in range(columns)])
        x = (torch.randn(offsets[-1], columns, generator=torch.Generator().manual_seed(seed)) * scale).clamp(0, 200)
        x = x.to(DTYPES[dtype])
    back, _ = round_trip(x, spec)
    assert back.shape == x.shape
    assert back.dtype == x.dtype
    assert bits(back) == bits(x)


def test_channels_with_their_own_range_are_coded_apart_and_noise_is_left_raw() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 64, generator=generator) + torch.linspace(-20, 20, 64)
    spec = ArraySpec(dtype="bfloat16", columns=64, offsets=(0, 2048, 4096), row_tokens=1)
    back, total = round_trip(x.bfloat16(), spec)
    assert bits(back) == bits(x.bfloat16())
    assert total < 0.62 * 2 * x.numel()  # the entropy of each channel by itself
    noise = torch.randint(0, 256, (4096, 64), generator=generator, dtype=torch.uint8)
    encoder = ArrayEncoder(noise, ArraySpec(dtype="uint8", columns=64, offsets=(0, 4096), row_tokens=1))
    assert (encoder.tables[0].of_context == RAW).all()
    assert sum(len(encoder.chunk(i)) for i in range(16)) == noise.numel()


def test_chunks_and_tables_that_are_cut_short_are_refused() -> None:
    x = torch.arange(3000).remainder(7).to(torch.uint8)[:, None].expand(-1, 2).contiguous()
    spec = ArraySpec(dtype="uint8", columns=2, offsets=(0, 3000), row_tokens=1)
    encoder = ArrayEncoder(x, spec)
    data = encoder.chunk(0)
    for length in [0, 3, 4, 100, len(data) - 1]:
        with pytest.raises(DamagedFile):
            ArrayDecoder(spec, encoder.tables).feed(0, np.frombuffer(data[:length], np.uint8), 0)
    stored = encoder.tables[0].to_bytes()
    num_tables = len(encoder.tables[0].frequencies)
    assert num_tables
    for length in range(len(stored)):
        with pytest.raises(DamagedFile):
            Tables.from_bytes(np.frombuffer(stored[:length], np.uint8), 2, num_tables)


def test_a_dtype_without_a_name_is_refused() -> None:
    with pytest.raises(BadArgument, match="float64"):
        split_planes(torch.zeros(1, dtype=torch.float64))
