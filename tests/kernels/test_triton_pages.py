"""Pages encoded and decoded by the Triton kernels: the bytes of the torch ones, through the interpreter on a CPU."""

import pytest
import torch
from implementations import TRITON_DEVICE, needs_triton

from steno.errors import BadArgument, KernelError
from steno.kernels import triton_runtime
from steno.kernels.quant import decode_pages, encode_pages
from steno.types import PageFormat

pytestmark = needs_triton


def random_kv(*shape, seed=0):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).unbind()


@pytest.mark.parametrize(
    ("fmt", "head_dim", "dtype"),
    [
        (PageFormat(bits=8, key_group=16, value_group=16), 64, torch.bfloat16),
        (PageFormat(bits=4, key_group=32, value_group=48), 80, torch.float32),
        (PageFormat(bits=4), 20, torch.float16),
        (PageFormat(bits=2, key_group=64, value_group=300), 96, torch.float32),
        (PageFormat(bits=2), 1, torch.float32),
    ],
)
def test_pages_are_the_same_bit_for_bit(fmt, head_dim, dtype):
    keys, values = random_kv(4, 64, head_dim, seed=head_dim)
    keys[1], values[1] = -3.25, 1e-4 * values[1]
    keys[2], values[2] = 1e30 * keys[2].sign(), 1e4 * values[2]
    if dtype == torch.float16:
        keys.clamp_(-60000, 60000)
    whole = torch.stack([keys, values]).to(dtype)
    keys, values = whole.movedim(1, 2).contiguous().movedim(1, 2)  # strided, as a slice of a tail is
    expected = encode_pages(keys, values, fmt, impl="torch")
    pages = encode_pages(keys.to(TRITON_DEVICE), values.to(TRITON_DEVICE), fmt, impl="triton")
    for x, y in zip(pages.tensors, expected.tensors, strict=True):
        assert torch.equal(x.cpu(), y)
    for out_dtype in (torch.float32, dtype):
        found = decode_pages(pages, out_dtype, impl="triton")
        for x, y in zip(found, decode_pages(expected, out_dtype, impl="torch"), strict=True):
            assert x.dtype == out_dtype
            assert torch.equal(x.cpu(), y)


def test_codes_halfway_between_two_numbers_round_to_the_even_one():
    column = torch.tensor([0.0, 15.0, 0.5, 1.5, 2.5, 13.5] + [7.0] * 58)
    keys = column[None, :, None].expand(1, 64, 16).to(TRITON_DEVICE)
    decoded, _ = decode_pages(encode_pages(keys, keys, PageFormat(bits=4), impl="triton"), impl="triton")
    assert decoded[0, :6, 0].tolist() == [0, 15, 0, 2, 2, 14]


def test_no_pages_give_no_pages():
    empty = torch.empty(0, 64, 16, device=TRITON_DEVICE)
    pages = encode_pages(empty, empty, PageFormat(bits=4), impl="triton")
    assert pages.num_pages == 0
    assert decode_pages(pages, impl="triton")[0].shape == (0, 64, 16)


def test_triton_by_name_is_an_error_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(triton_runtime, "why_missing", lambda: "it is not here")
    with pytest.raises(KernelError, match="missing: it is not here"):
        encode_pages(*random_kv(1, 64, 16), PageFormat(bits=4), impl="triton")
    with pytest.raises(BadArgument, match="did you mean 'triton'"):
        encode_pages(*random_kv(1, 64, 16), PageFormat(bits=4), impl="trito")
