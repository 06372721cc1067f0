"""Pages whose codes stand for levels: golden values of the formats, the error of Gaussian data, degenerate groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steno.errors import BadArgument
from steno.kernels.attention import PageSpan, SpanTable, attend
from steno.kernels.quant import decode_pages, encode_pages, page_bytes
from steno.kernels.quant.codebooks import CODEBOOKS, E2M1_HALF, e2m1_codes, level_table, lloyd_max, nearest_levels
from steno.kernels.quant.sides import PageSide
from steno.types import PageFormat

GROUPS = {"nvfp4": 16, "q8_0": 32, "q4_0": 32}


def page_format(name, head_dim=64):
    group = GROUPS.get(name, head_dim)
    return PageFormat(bits=CODEBOOKS[name].bits, key_group=group, value_group=group, codebook=name)


def random_kv(pages, head_dim, seed=0):
    return torch.randn(2, pages, 64, head_dim, generator=torch.Generator().manual_seed(seed)).unbind()


def test_e4m3_codes_are_those_of_torch():
    levels = CODEBOOKS["e4m3"].levels
    assert max(levels) == 448
    for code in [*range(0x7F), *range(0x80, 0xFF)]:
        assert int(torch.tensor(levels[code]).to(torch.float8_e4m3fn).view(torch.uint8)) == code
    groups = torch.tensor([[448.0, -(2.0**-9), 17.0, 19.0]])  # 17 and 19 are halfway between 16, 18 and 20
    codes, scales, _ = CODEBOOKS["e4m3"].quantize(groups)
    assert scales.tolist() == [[1.0]]
    assert [levels[code] for code in codes[0].tolist()] == [448.0, -(2.0**-9), 16.0, 20.0]


def test_e2m1_rounds_ties_to_even():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    rounded = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    levels = CODEBOOKS["nvfp4"].levels
    assert [levels[code] for code in e2m1_codes(ties).tolist()] == rounded
    assert [levels[code] for code in e2m1_codes(-ties).tolist()] == [-x for x in rounded]
    both = torch.tensor([*E2M1_HALF, *(-x for x in E2M1_HALF)])
    assert e2m1_codes(both).tolist() == [*range(16)]
    assert e2m1_codes(torch.tensor([7.0, -1e9])).tolist() == [7, 15]


def test_q4_0_golden():
    codes, scales, _ = CODEBOOKS["q4_0"].quantize(0.1 * (torch.arange(32) - 12.0)[None])
    expected = "13,13,12,12,11,11,11,10,10,9,9,8,8,8,7,7,6,6,5,5,5,4,4,3,3,3,2,2,1,1,0,0"
    assert codes[0].tolist() == [int(code) for code in expected.split(",")]
    assert float(scales) == pytest.approx(-0.2375, rel=2**-11)


def test_q8_0_rounds_halves_away_from_zero():
    codes, scales, _ = CODEBOOKS["q8_0"].quantize(torch.tensor([[127.0, 0.5, -0.5, 1.49, -2.5, 0.0]]))
    assert float(scales) == 1.0
    assert [code - 128 for code in codes[0].tolist()] == [127, 1, -1, 1, -3, 0]


@pytest.mark.parametrize(
    ("bits", "half"),
    [
        (1, [0.79788]),
        (2, [0.45278, 1.51042]),
        (4, [0.1284, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259]),
    ],
)
def test_lloyd_max_golden(bits, half):
    levels = lloyd_max(bits)
    assert levels[len(half) :] == pytest.approx(half, abs=6e-6)
    assert levels[: len(half)] == tuple(-x for x in levels[: len(half) - 1 : -1])


def test_nearest_level_is_the_nearest():
    levels = torch.tensor(lloyd_max(4))
    x = torch.randn(500, generator=torch.Generator().manual_seed(1))
    assert torch.equal(nearest_levels(x, levels), (x[:, None] - levels).abs().argmin(1))


# mean squared error of Gaussian data over its variance, from definitions of the formats
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("e4m3", 7.0e-4), ("q8_0", 2.9e-5), ("q4_0", 7.4e-3), ("nvfp4", 9.1e-3),
        ("normal1", 0.363), ("normal2", 0.1175), ("normal4", 0.0095),
    ],
)  # fmt: skip
def test_error_of_gaussian_data(name, error):
    kv = random_kv(32, 128)
    for x, y in zip(kv, decode_pages(encode_pages(*kv, page_format(name, 128))), strict=True):
        assert float((x - y).square().mean() / x.square().mean()) == pytest.approx(error, rel=0.07)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("e4m3", 8.125), ("e5m2", 8.125), ("q8_0", 8.5), ("q4_0", 4.5), ("normal1", 1.125), ("normal4_nc", 4.125)],
)
def test_bits_per_value(name, bits):
    assert page_bytes(page_format(name, 128), 128) * 8 == bits * 2 * 64 * 128


def test_nvfp4_is_four_and_a_half_bits_and_a_number_per_page():
    assert page_bytes(page_format("nvfp4"), 64) == 2 * (64 * 64 * 4.5 / 8 + 4)


@pytest.mark.parametrize("name", CODEBOOKS)
@given(
    head_dim=st.sampled_from([1, 20, 64, 80, 128]),
    factor=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e3, 1e38]),
    constant=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, deadline=None)
def test_whatever_comes_stays_finite_and_the_same(name, head_dim, factor, constant, seed):
    keys, values = random_kv(2, head_dim, seed)
    keys, values = (torch.ones_like(keys), -torch.ones_like(keys)) if constant else (keys, values)
    keys, values = keys * factor, values * factor
    before = keys.clone(), values.clone()
    pages = encode_pages(keys, values, page_format(name, head_dim))
    assert all(torch.equal(a, b) for a, b in zip(before, (keys, values), strict=True))
    again = encode_pages(keys, values, page_format(name, head_dim))
    assert all(torch.equal(a, b) for a, b in zip(pages.tensors, again.tensors, strict=True))
    for x, y in zip((keys, values), decode_pages(pages), strict=True):
        assert y.isfinite().all()
        if 1e-30 < factor < 1e38:
            assert (x - y).square().mean() <= 0.75 * x.square().mean()
        if factor == 0:
            assert not y.any()


@pytest.mark.parametrize("name", CODEBOOKS)
def test_pages_of_zeros_are_attended(name):
    keys = torch.zeros(1, 64, 64)
    table = SpanTable.build([[[PageSpan(encode_pages(keys, keys, page_format(name)))]]], head_dim=64)
    out, lse = attend(torch.ones(1, 1, 1, 64), table, scale=1.0, causal=False)
    assert not out.any()
    assert float(lse) == pytest.approx(torch.tensor(64.0).log().item(), rel=1e-6)


@pytest.mark.parametrize("name", ["nvfp4", "q4_0"])
def test_scaling_by_a_power_of_two_leaves_the_codes(name):
    keys, values = random_kv(1, 64)
    a, b = (encode_pages(keys * f, values * f, page_format(name)) for f in (1.0, 4.0))
    assert torch.equal(a.key_codes, b.key_codes)
    assert torch.equal(a.value_codes, b.value_codes)


def test_the_largest_element_is_exact():
    keys, values = random_kv(4, 64)
    for name in ("q4_0", "q8_0"):
        for x, y in zip((keys, values), decode_pages(encode_pages(keys, values, page_format(name))), strict=True):
            x, y = x.reshape(-1, 32), y.reshape(-1, 32)
            largest = x.abs().argmax(1, keepdim=True)
            torch.testing.assert_close(y.gather(1, largest), x.gather(1, largest), rtol=2**-11, atol=0)


def test_level_tables_are_repeated_to_sixteen():
    assert level_table("normal1").view(8, 2).tolist() == [[level_table("normal1")[0], level_table("normal1")[1]]] * 8
    assert level_table("nvfp4").tolist() == [*E2M1_HALF, *(-x for x in E2M1_HALF)]


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        (PageFormat(bits=4, codebook="q4_1"), "unknown codebook 'q4_1'"),
        (PageFormat(bits=8, codebook="q4_0"), "codes of q4_0 have 4 bits; got bits=8"),
        (
            PageFormat(bits=4, key_group=24, codebook="q4_0"),
            "groups of q4_0 must be a multiple of 16 or at least head_dim",
        ),
        (
            PageFormat(bits=2, key_group=32, codebook="normal2"),
            "groups of normal2 must be at least head_dim 64; got 32",
        ),
    ],
)
def test_bad_formats_are_refused(fmt, message):
    with pytest.raises(BadArgument, match=message):
        encode_pages(*random_kv(1, 64), fmt)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_other_encoders_are_refused(impl):
    with pytest.raises(BadArgument, match="encoded and decoded by plain torch alone"):
        encode_pages(*random_kv(1, 64), page_format("q4_0"), impl=impl)


@pytest.mark.parametrize("name", ["e4m3", "nvfp4", "q4_0"])
def test_a_side_alone_is_that_of_the_page(name):
    keys, values = random_kv(2, 48)
    decoded = decode_pages(encode_pages(keys, values, page_format(name, 48)))
    for x, y, is_keys in zip((keys, values), decoded, (True, False), strict=True):
        side = PageSide.encode(x, page_format(name, 48), is_keys=is_keys)
        assert torch.equal(side.decode(torch.float32), y)
