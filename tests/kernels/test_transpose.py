"""Matrices of bytes transposed: any shape, rows that lie apart, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steno.errors import BadArgument
from steno.kernels.transpose import transposed


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 70), columns=st.integers(0, 70), skipped=st.integers(0, 3), seed=st.integers(0, 99))
def test_it_is_numpys(rows: int, columns: int, skipped: int, seed: int) -> None:
    x = np.random.default_rng(seed).integers(0, 256, (rows, columns + skipped), np.uint8)[:, skipped:]
    out = transposed(x)
    assert out.flags.c_contiguous
    assert np.array_equal(out, x.T)


@pytest.mark.parametrize("x", [np.zeros(4, np.uint8), np.zeros((2, 3), np.int8), np.zeros((2, 2, 2), np.uint8)])
def test_what_is_no_matrix_of_bytes_is_refused(x: np.ndarray) -> None:
    with pytest.raises(BadArgument, match="uint8"):
        transposed(x)
