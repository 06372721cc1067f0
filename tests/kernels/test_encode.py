"""The native page encoder against plain torch, bit for bit, in every instruction set."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steno.errors import BadArgument, KernelError
from steno.kernels import native
from steno.kernels.quant import cpu, decode_pages, encode_pages
from steno.types import PageFormat

ISAS = native.available_isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="the native library is not built")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
BITS = st.sampled_from([8, 4, 2])
GROUPS = st.tuples(st.sampled_from([16, 32, 64]), st.sampled_from([16, 48, 64, 300]))
SPECIAL = [0.0, -0.0, 1e-45, -3e-39, 5.9e-8, -1e-6, 6.1e-5, 65504.0, -65519.0, 7e4, -3e38, 3.4e38]


def bits_of(x):
    """fp16 and codes as integers, every NaN as one."""
    if x.dtype == torch.uint8:
        return x
    return torch.where(x.isnan(), 0x7E00, x.view(torch.int16))


def check(keys, values, fmt):
    expected = encode_pages(keys, values, fmt, impl="torch").tensors
    for isa in ISAS:
        for num_threads in (1, 3):
            found = cpu.encode_pages(keys, values, fmt, isa=isa, num_threads=num_threads)
            for a, b, name in zip(
                found, expected, ("key codes", "value codes", "key params", "value params"), strict=True
            ):
                assert torch.equal(bits_of(a), bits_of(b)), f"{name} of {isa}"


@given(
    bits=BITS,
    groups=GROUPS,
    head_dim=st.sampled_from([1, 8, 16, 20, 64, 80, 144]),
    num_pages=st.integers(1, 9),
    dtype=DTYPES,
    spread=st.sampled_from([0.0, 1.0, 6.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_the_same_bits_as_torch(bits, groups, head_dim, num_pages, dtype, spread, seed):
    key_group, value_group = groups
    value_group = value_group if value_group % 16 == 0 else max(value_group, head_dim)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, num_pages, 64, head_dim, generator=generator)
    x *= 10 ** (spread * torch.randn(2, num_pages, 64, 1, generator=generator))
    check(*x.to(dtype).unbind(), PageFormat(bits=bits, key_group=key_group, value_group=value_group))


@given(bits=BITS, groups=GROUPS, head_dim=st.sampled_from([20, 64]), dtype=DTYPES, seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_numbers_at_the_edges(bits, groups, head_dim, dtype, seed):
    """Zeros of both signs, subnormals, what fp16 cannot hold; in constant groups and mixed."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.tensor(SPECIAL)
    mixed = numbers[torch.randint(len(SPECIAL), (64, head_dim), generator=generator)]
    zeros = torch.tensor([0.0, -0.0])[torch.randint(2, (64, head_dim), generator=generator)]
    constant = numbers[torch.randint(len(SPECIAL), (4, 1, 1), generator=generator)].expand(-1, 64, head_dim)
    x = torch.cat([mixed[None], zeros[None], constant]).to(dtype)
    check(x, x.flip(0), PageFormat(bits=bits, key_group=groups[0], value_group=max(groups[1], 16)))


@given(bits=BITS, groups=GROUPS, number=st.sampled_from([math.nan, math.inf, -math.inf]), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_numbers_that_are_none(bits, groups, number, seed):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 3, 64, 40, generator=generator).unbind()
    for x in (keys, values):
        x.view(-1)[torch.randint(x.numel(), (20,), generator=generator)] = number
    check(keys, values, PageFormat(bits=bits, key_group=groups[0], value_group=groups[1]))


def test_infinities_saturate_and_nan_stays_in_its_group():
    keys = torch.randn(1, 64, 32)
    values = keys.clone()
    values[0, 3, 20], values[0, 5, 2], values[0, 6, 2] = math.nan, math.inf, -math.inf
    decoded = decode_pages(encode_pages(keys, values, PageFormat(bits=4, value_group=16)))[1]
    assert decoded[0, 3, 16:].isnan().all()
    assert decoded.isnan().sum() == 16
    assert decoded[0, 5, 2] > 6e4
    assert decoded[0, 6, 2] < -6e4


def test_tensors_are_read_where_they_lie():
    fmt = PageFormat(bits=4)
    buffer = torch.randn(2, 3, 200, 24)  # rows, heads, capacity
    slices = buffer[:, :, :128, :20], buffer[:, :, 64:192, 4:]
    keys, values = (x.unflatten(2, (2, 64)) for x in slices)
    assert keys.data_ptr() == buffer.data_ptr()
    expected = encode_pages(*(x.contiguous().flatten(0, 2) for x in (keys, values)), fmt, impl="torch")
    found = encode_pages(keys, values, fmt)
    assert found.num_pages == 12
    assert all(torch.equal(a, b) for a, b in zip(found.tensors, expected.tensors, strict=True))
    turned = keys.transpose(3, 4).contiguous().transpose(3, 4)  # channels apart in memory
    check(turned.flatten(0, 2), values.flatten(0, 2), fmt)


def test_no_pages_and_no_library(tmp_path, monkeypatch):
    fmt = PageFormat(bits=2)
    assert encode_pages(*torch.randn(2, 0, 64, 8).unbind(), fmt).num_pages == 0
    keys, values = torch.randn(2, 2, 64, 8).unbind()
    expected = encode_pages(keys, values, fmt)
    monkeypatch.setattr(native, "LIBRARY_DIR", tmp_path)
    with pytest.raises(KernelError, match="not compiled"):
        cpu.encode_pages(keys, values, fmt)
    assert all(
        torch.equal(a, b) for a, b in zip(encode_pages(keys, values, fmt).tensors, expected.tensors, strict=True)
    )


def test_other_dtypes_are_left_to_torch():
    keys, values = torch.randn(2, 2, 64, 8, dtype=torch.float64).unbind()
    with pytest.raises(BadArgument, match="of one dtype"):
        cpu.encode_pages(keys, values, PageFormat(bits=4))
    assert encode_pages(keys, values, PageFormat(bits=4)).num_pages == 2
