"""Products with packed matrices: against the decoded ones, in every instruction set, and the error of one-bit codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steno.kernels import native
from steno.kernels.quant import cpu, matrices
from steno.kernels.quant.matrices import (
    column_products,
    pack_columns,
    pack_integers,
    pack_plain,
    pack_signs,
    pack_ternary,
    row_products,
)
from steno.kernels.quant.packing import pack_trits, unpack_trits

ISAS = native.available_isas()
KINDS = ["int8", "int4", "int2", "plain4", "plain2", "signs", "ternary", "columns4", "columns2"]


def packed(kind, matrix, group):
    if kind.startswith("int"):
        return pack_integers(matrix, bits=int(kind[3:]), group=group)
    if kind.startswith("plain"):
        bits = int(kind[5:])
        return pack_plain((matrix.abs() * 5).long().clamp(max=2**bits - 1).to(torch.uint8), bits=bits)
    if kind.startswith("columns"):
        rows = matrix.shape[1]
        return pack_columns(matrix, bits=int(kind[7:]), group=group if rows % group == 0 else rows)[0]
    return (pack_signs if kind == "signs" else pack_ternary)(matrix, group=group)


@given(rows=st.integers(1, 70), columns=st.integers(1, 70), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_unpack_undoes_pack(rows, columns, seed):
    digits = torch.randint(3, (2, rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    bytes_ = pack_trits(digits)
    assert bytes_.shape[1] == -(-rows // 5) * -(-columns // 16) * 16
    assert torch.equal(unpack_trits(bytes_, rows, columns), digits)


def test_every_byte_of_five_trits_is_its_own():
    digits = torch.cartesian_prod(*[torch.arange(3)] * 5).to(torch.uint8)  # [243, 5]
    assert len(pack_trits(digits.T[None]).unique()) == 243


@pytest.mark.skipif(not ISAS, reason="the native library is not built")
@pytest.mark.parametrize("kind", KINDS)
@given(
    shape=st.sampled_from(
        [(64, 64), (20, 64), (40, 64), (64, 80), (128, 64), (64, 20), (1, 16), (48, 112), (64, 256), (300, 32)]
    ),
    num=st.integers(1, 6),
    vectors=st.integers(1, 9),
    group=st.sampled_from([16, 32, 64, 1000]),
    seed=st.integers(0, 999),
)
@settings(max_examples=25, deadline=None)
def test_native_products_are_those_of_the_decoded_matrices(kind, shape, num, vectors, group, seed):
    g = torch.Generator().manual_seed(seed)
    rows, columns = shape
    m = packed(kind, torch.randn(num, rows, columns, generator=g), group)
    decoded = m.decode(torch.float64)
    x, w = torch.randn(vectors, rows, generator=g), torch.rand(vectors, num * rows, generator=g)
    expected = torch.einsum("mr,prc->mpc", x.double(), decoded).flatten(1)
    mixed = w.double() @ decoded.flatten(0, 1)
    for found, right in ((row_products(x, m), expected), (column_products(w, m), mixed)):
        close(found, right, 2e-3 if kind.startswith("int") else 2e-5)
    padded = -(-columns // 16) * 16
    for isa in ISAS:
        out = torch.zeros(vectors, num, padded)
        lines = matrices._whole_rows(x, 1, rows)
        cpu.multiply(lines, out, m, matrices._table(m), x_step=0, out_step=padded, isa=isa)
        # dot products of whole numbers keep 14 or 15 bits of a coefficient
        close(
            out[:, :, :columns].flatten(1),
            expected,
            2e-3 if isa in ("avx2", "vnni", "bf16") and kind.startswith("int") else 2e-5,
        )


def close(found, right, tolerance):
    torch.testing.assert_close(found.double(), right, rtol=0, atol=tolerance * (1 + float(right.abs().max())))


@pytest.mark.parametrize("kind", KINDS)
def test_torch_products_are_those_of_the_decoded_matrices(kind):
    g = torch.Generator().manual_seed(0)
    m = packed(kind, torch.randn(19, 20, 64, generator=g), 32)
    decoded = m.decode(torch.float64)
    x, w = torch.randn(3, 20, generator=g).double(), torch.rand(3, 19 * 20, generator=g).double()
    torch.testing.assert_close(row_products(x, m), torch.einsum("mr,prc->mpc", x, decoded).flatten(1))
    torch.testing.assert_close(column_products(w, m), w @ decoded.flatten(0, 1))


def test_columns_are_off_by_half_a_step():
    x = torch.randn(3, 64, 20, generator=torch.Generator().manual_seed(0))
    x[0, :32, 4] = 1.5  # a group of one number
    for bits in (4, 2):
        packed, minima = pack_columns(x, bits=bits, group=32)
        assert minima.shape == (3, 2, 20)
        decoded = packed.decode() + minima.float().repeat_interleave(32, dim=1)
        grouped = x.unflatten(1, (2, 32))
        half = ((grouped.amax(2) - grouped.amin(2)) / (2**bits - 1) / 2).repeat_interleave(32, dim=1)
        assert ((decoded - x).abs() <= half + 4e-3).all()


def test_one_bit_of_constant_magnitude_is_exact():
    x = 3.5 * torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).sign()
    assert torch.equal(pack_signs(x, group=32).decode(), x)
    assert torch.equal(pack_ternary(x, group=32).decode(), x)


@pytest.mark.parametrize("pack", [pack_signs, pack_ternary])
@pytest.mark.parametrize("factor", [0.0, 1.0, 8.0])
def test_scaling_scales_what_is_decoded(pack, factor):
    x = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pack(x * factor, group=32).decode(), factor * pack(x, group=32).decode())


# of Gaussian data: 1 - 2 / pi; and for three levels with the mean magnitude a = 0.798 and the border at a / 2
@pytest.mark.parametrize(("pack", "error"), [(pack_signs, 0.3634), (pack_ternary, 0.2634)])
def test_error_of_gaussian_data(pack, error):
    x = torch.randn(64, 64, 64, generator=torch.Generator().manual_seed(0))
    assert float((pack(x, group=64).decode() - x).square().mean()) == pytest.approx(error, rel=0.03)
