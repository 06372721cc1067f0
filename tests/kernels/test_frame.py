"""Numbers in a basis and values: the fused passes against plain products, at any size, rotated or not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steno.errors import BadArgument
from steno.kernels import frame

sizes = st.sampled_from([(1, 16), (1, 64), (3, 64), (2, 80), (1, 128), (4, 48)])
any_problem = given(
    n=st.integers(0, 40), size=sizes, share=st.sampled_from([0, 0.5, 1]), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)  # fmt: skip
runs = pytest.mark.skipif(not frame.can_fuse([torch.zeros(1, 16)]), reason="no AVX-512 for bfloat16 here")


def problem(n: int, size: tuple[int, int], half: int, dtype: torch.dtype, seed: int) -> tuple:
    """Numbers, a basis of whole numbers, a mean, places for the values and angles."""
    heads, dim = size
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-128, 128, (n, heads * dim), dtype=torch.int8, generator=generator)
    basis = torch.randint(-128, 128, (heads * dim, heads * dim), dtype=torch.int8, generator=generator)
    angles = [torch.rand(n, half, generator=generator) * 7 for _ in range(heads)] if half else []
    mean = torch.randn(heads * dim, generator=generator)
    places = [torch.full((n, dim), torch.nan, dtype=dtype) for _ in range(heads)]
    return numbers, basis, mean, places, [(a.cos(), a.sin()) for a in angles]


def turned(x: torch.Tensor, angles: list, heads: int, sign: int) -> list[torch.Tensor]:
    """fp64 `[n, D]` of each head, by complex numbers."""
    parts = [part.clone() for part in x.chunk(heads, 1)]
    for part, (cos, sin) in zip(parts, angles, strict=False):
        half = cos.shape[1]
        z = torch.complex(part[:, :half], part[:, half : 2 * half])
        z = z * torch.complex(cos.double(), sign * sin.double())
        part[:, : 2 * half] = torch.cat([z.real, z.imag], 1)
    return parts


@runs
@settings(max_examples=50, deadline=None)
@any_problem
def test_values_of_numbers(n: int, size: tuple[int, int], share: float, dtype: torch.dtype, seed: int) -> None:
    half = int(size[1] // 2 * share)
    numbers, basis, mean, places, angles = problem(n, size, half, dtype, seed)
    frame.decode(numbers, basis, 0.01, mean, places, angles)
    expected = turned((numbers.double() @ basis.double()) * 0.01 + mean.double(), angles, size[0], 1)
    for place, wanted in zip(places, expected, strict=True):
        # half a unit in the last place, and what fp32 adds to it before
        error = (place.double() - wanted).abs()
        assert (error <= wanted.abs() * torch.finfo(dtype).eps / 2 * 1.01 + 1e-3).all()


@runs
@settings(max_examples=50, deadline=None)
@any_problem
def test_numbers_of_values(n: int, size: tuple[int, int], share: float, dtype: torch.dtype, seed: int) -> None:
    half = int(size[1] // 2 * share)
    numbers, basis, mean, places, angles = problem(n, size, half, dtype, seed)
    values = [torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(dtype) * 3 for x in places]
    inverse = (basis.float() / 128).bfloat16()
    numbers.fill_(99)
    largest = frame.encode(values, inverse, 0.4, mean, numbers, angles)
    assert largest == (int(numbers.int().abs().max()) if n else 0)
    plain = [turned(x.double(), angles[h : h + 1], 1, -1)[0] for h, x in enumerate(values)]
    centred = (torch.cat(plain, 1) - mean.double()).float().bfloat16().double()
    exact = centred @ inverse.double()
    expected = (exact.abs() + 0.4).floor() * exact.sign()
    # where a product is near a border, roundings before it decide: of a channel to bfloat16, maybe the other way
    unsure = (centred.abs()[:, :, None] * inverse.double().abs()).amax(1) / 100 + 1e-3 if n else exact
    lower = ((exact.abs() - unsure).clamp_min(0) + 0.4).floor().clamp_max(127)
    upper = ((exact.abs() + unsure) + 0.4).floor().clamp_max(127)
    assert ((numbers.abs() >= lower) & (numbers.abs() <= upper)).all()
    sure = (lower == upper) & (lower > 0)
    assert torch.equal(numbers.double()[sure], expected.clamp(-127, 127)[sure])
    assert not n or (lower == upper).double().mean() > 0.3


@runs
def test_the_largest_numbers_add_up() -> None:
    numbers, basis, mean, places, _ = problem(7, (4, 64), 0, torch.float32, 0)
    frame.decode(numbers.fill_(-128), basis.fill_(-128), 1.0, mean.zero_(), places)
    assert all((x == 256 * 128 * 128).all() for x in places)


@runs
@pytest.mark.parametrize("wrong", ["numbers", "matrix", "mean", "heads", "angles"])
def test_what_does_not_fit_is_refused(wrong: str) -> None:
    numbers, basis, mean, places, angles = problem(9, (2, 32), 8, torch.float32, 0)
    given = {"numbers": numbers, "matrix": basis, "mean": mean, "heads": places, "angles": angles}
    given[wrong] = {
        "numbers": numbers[:8], "matrix": basis.T, "mean": mean.double(), "heads": [places[0], places[1][:8]],
        "angles": angles[:1],
    }[wrong]  # fmt: skip
    with pytest.raises(BadArgument, match=r"must be|do not fit"):
        frame.decode(given["numbers"], given["matrix"], 1.0, given["mean"], given["heads"], given["angles"])


def test_what_cannot_be_fused() -> None:
    assert not frame.can_fuse([torch.zeros(3, 24)])
    assert not frame.can_fuse([torch.zeros(3, 32, dtype=torch.float16)])
    assert not frame.can_fuse([torch.zeros(32, 3).T])
