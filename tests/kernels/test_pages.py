"""Pages: packing, round trip, golden bytes, the error of the literature."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steno.errors import BadArgument
from steno.kernels.quant import cat_pages, decode_pages, encode_pages, page_bytes
from steno.kernels.quant.packing import code_bytes, pack_codes, unpack_codes
from steno.kernels.quant.sides import PageSide
from steno.types import PageFormat

BITS = st.sampled_from([8, 4, 2])


@st.composite
def formats(draw):
    return PageFormat(
        bits=draw(BITS),
        key_group=draw(st.sampled_from([16, 32, 64])),
        value_group=draw(st.sampled_from([16, 48, 64, 300])),
    )


def random_kv(pages, head_dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, pages, 64, head_dim, generator=generator).unbind()


@given(bits=BITS, rows=st.integers(1, 70), columns=st.integers(1, 70), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_unpack_undoes_pack(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (3, rows, columns), dtype=torch.uint8, generator=generator)
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, code_bytes(rows, columns, bits))
    assert torch.equal(unpack_codes(packed, rows, columns, bits), codes)


@given(
    fmt=formats(),
    head_dim=st.sampled_from([1, 8, 16, 20, 64, 80]),
    factor=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_error_is_at_most_half_a_step(fmt, head_dim, factor, seed):
    keys, values = random_kv(2, head_dim, seed)
    keys, values = keys.clamp(-1, 1) * factor + factor, values.clamp(-1, 1) * factor
    pages = encode_pages(keys, values, fmt)
    decoded = decode_pages(pages)
    columns = [(keys.transpose(1, 2), decoded[0].transpose(1, 2), fmt.key_group), (values, decoded[1], fmt.value_group)]
    for x, y, group in columns:
        for group_x, group_y in zip(x.split(group, dim=2), y.split(group, dim=2), strict=True):
            low, high = group_x.amin(2, keepdim=True), group_x.amax(2, keepdim=True)
            # fp16 rounds the minimum and the scale by at most 2^-11 of their size, or of the smallest normal number
            slack = (low.abs() + (high - low)) * 2**-11 + 1e-5
            assert ((group_x - group_y).abs() <= (high - low) / (2**fmt.bits - 1) / 2 + slack).all()
            assert ((low - group_y.amin(2, keepdim=True)).abs() <= slack).all()


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("value", [0.0, -3.25, 1e4, 1e-4])
def test_constant_groups_stay_what_they_are(bits, value):
    constant = torch.full((1, 64, 20), value)
    for decoded in decode_pages(encode_pages(constant, constant, PageFormat(bits=bits))):
        assert (decoded - constant).abs().max() <= abs(value) * 2**-11 + 1e-7


def test_what_fp16_cannot_hold_stays_finite():
    keys, values = random_kv(1, 16)
    for decoded in decode_pages(encode_pages(keys * 1e30, values * 1e6, PageFormat(bits=4))):
        assert decoded.isfinite().all()


# D = 2; keys of channel 0 count up along the tokens, shifted by one from block to block, channel 1 is the mirror image.
# A dword is a token of a block of 16, its first two bytes are the two channels.
GOLDEN_KEYS = {
    4: "000f0000 010e0000 020d0000 030c0000 040b0000 050a0000 06090000 07080000 "
    "08070000 09060000 0a050000 0b040000 0c030000 0d020000 0e010000 0f000000",
    2: "00030000 01020000 02010000 03000000 " * 4,
}


@pytest.mark.parametrize(("bits", "num_value_lines"), [(4, 8), (2, 4)])
def test_golden_bytes(bits, num_value_lines):
    top, token = 2**bits - 1, torch.arange(64)
    up = (token % 16 + token // 16) % 2**bits
    keys = torch.stack([up, top - up], dim=1)[None].float()
    even = token % 2 == 0
    values = torch.stack([torch.where(even, 0, top), torch.where(even, top, 0)], dim=1)[None].float()
    pages = encode_pages(keys, values, PageFormat(bits=bits))
    tokens = GOLDEN_KEYS[bits].split()
    lines = "".join("".join(tokens[b:] + tokens[:b]) for b in range(4))
    assert bytes(pages.key_codes[0].tolist()).hex() == lines
    # a dword is a channel, its bytes are four tokens, the fields of a byte tokens four apart
    assert bytes(pages.value_codes[0].tolist()).hex() == ("00ff00ff" + "ff00ff00" + "00000000" * 14) * num_value_lines
    assert pages.key_params.tolist() == [[[[1.0, 1.0]], [[0.0, 0.0]]]]
    assert pages.value_params.tolist() == [[[[1.0] * 64], [[0.0] * 64]]]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_every_code_lies_where_the_rule_says(bits):
    per_line = 32 // bits
    codes = torch.randint(2**bits, (2, 20, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack_codes(codes, bits)
    assert packed.shape == (2, code_bytes(20, 33, bits))
    for row, column in ((0, 0), (3, 1), (4, 16), (7, 31), (13, 32), (19, 32)):
        line, row_in_line = row // per_line * 3 + column // 16, row % per_line
        byte = packed[:, 64 * line + 4 * (column % 16) + row_in_line % 4]
        assert torch.equal(byte >> bits * (row_in_line // 4) & 2**bits - 1, codes[:, row, column])
    assert torch.equal(unpack_codes(packed, 20, 33, bits), codes)


def test_golden_bytes_of_int8():
    token = torch.arange(64)
    keys = (token * 3).masked_fill(token == 63, 255)[None, :, None].float()
    pages = encode_pages(keys, torch.zeros_like(keys), PageFormat(bits=8))
    assert pages.key_codes[0].view(64, 4).tolist() == [[code, 0, 0, 0] for code in [*range(0, 189, 3), 255]]
    assert pages.value_codes[0].tolist() == [0] * 64 * 16
    assert pages.key_params.tolist() == [[[[1.0]], [[0.0]]]]


# mean squared error of Gaussian data over its variance, as the KIVI reference implementation gives
@pytest.mark.parametrize(("bits", "group", "error"), [(2, 32, 0.154), (2, 64, 0.203), (4, 32, 0.0061)])
def test_error_of_gaussian_data(bits, group, error):
    keys, values = random_kv(64, 64)
    decoded = decode_pages(encode_pages(keys, values, PageFormat(bits=bits, key_group=group, value_group=group)))
    for x, y in zip((keys, values), decoded, strict=True):
        assert float((x - y).square().mean() / x.square().mean()) == pytest.approx(error, rel=0.1)


@given(fmt=formats(), head_dim=st.sampled_from([1, 20, 64, 80]))
@settings(max_examples=20, deadline=None)
def test_bytes_slices_and_cat(fmt, head_dim):
    pages = encode_pages(*random_kv(5, head_dim), fmt)
    assert pages.nbytes == 5 * page_bytes(fmt, head_dim) == sum(tensor.nbytes for tensor in pages.tensors)
    assert pages[1:3].num_pages == 2
    assert pages[1:3].key_codes.data_ptr() == pages.key_codes[1].data_ptr()
    joined = cat_pages([pages[:2], pages[2:2], pages[2:]])
    assert all(torch.equal(a, b) for a, b in zip(joined.tensors, pages.tensors, strict=True))


def test_bfloat16_input_is_not_changed():
    keys, values = (x.bfloat16() for x in random_kv(2, 16))
    before = keys.clone(), values.clone()
    encode_pages(keys, values, PageFormat(bits=4))
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        (PageFormat(bits=3), "bits must be 8, 4 or 2; got 3"),
        (PageFormat(bits=4, key_group=8), "key_group must be 16, 32 or 64 tokens; got 8"),
        (PageFormat(bits=4, value_group=24), "value_group must be a multiple of 16 or at least head_dim 64; got 24"),
        (PageFormat(bits=4, value_group=0), "got 0"),
    ],
)
def test_bad_formats_are_refused(fmt, message):
    with pytest.raises(BadArgument, match=message):
        encode_pages(*random_kv(1, 64), fmt)


def test_bad_shapes_are_refused():
    keys, values = random_kv(1, 64)
    with pytest.raises(BadArgument, match="must both be"):
        encode_pages(keys[:, :63], values[:, :63], PageFormat(bits=4))
    with pytest.raises(BadArgument, match="one format"):
        cat_pages([encode_pages(keys, values, PageFormat(bits=4)), encode_pages(keys, values, PageFormat(bits=2))])
    with pytest.raises(BadArgument, match="at least one"):
        cat_pages([])


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_side_by_itself_is_that_of_the_pages(bits: int) -> None:
    keys, values = torch.randn(3, 64, 80), torch.randn(3, 64, 80)
    fmt = PageFormat(bits=bits, key_group=32, value_group=32)
    pages = encode_pages(keys, values, fmt, impl="torch")
    decoded = decode_pages(pages)
    for x, is_keys, whole in ((keys, True, decoded[0]), (values, False, decoded[1])):
        side = PageSide.encode(x, fmt, is_keys=is_keys)
        assert torch.equal(side.codes, pages.key_codes if is_keys else pages.value_codes)
        assert torch.equal(side.decode(torch.float32), whole)
        assert torch.equal(side[:1].followed_by(side[1:]).decode(torch.float32), whole)
