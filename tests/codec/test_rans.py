"""The entropy coder against its oracle: any symbols, any runs, any instruction set; and streams that were tampered with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steno.errors import BadArgument, DamagedFile
from steno.kernels import native, rans

needs_native = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
IMPLS = ["naive"] if native.why_missing() else ["naive", "cpu"]
ISAS = native.available_isas() or ["portable"]


@st.composite
def coded(draw: st.DrawFn) -> tuple[np.ndarray, list[tuple[int, int]], np.ndarray]:
    """Symbols of several runs, and tables that have them all."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_tables = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.one_of(st.integers(0, 3), st.integers(30, 70), st.just(500)), max_size=5))
    alphabet, skew = draw(st.integers(1, 256)), draw(st.sampled_from([0.0, 1.0, 8.0]))
    weights = np.exp(-skew * np.arange(alphabet) / alphabet * 4)
    used = rng.permutation(256)[:alphabet]
    runs = [(length, int(rng.integers(num_tables))) for length in lengths]
    symbols = rng.choice(used, size=sum(lengths), p=weights / weights.sum()).astype(np.uint8)
    counts, end = np.zeros((num_tables, 256), np.int64), 0
    for length, table in runs:
        counts[table] += np.bincount(symbols[end : end + length], minlength=256)
        end += length
    return symbols, runs, rans.normalize(counts)


@settings(max_examples=60, deadline=None)
@given(coded())
@example((np.zeros(0, np.uint8), [], rans.normalize(np.eye(1, 256))))
@example((np.full(1, 255, np.uint8), [(1, 0)], rans.normalize(np.eye(1, 256, 255))))
def test_every_implementation_writes_and_reads_the_oracles_streams(case) -> None:
    symbols, runs, frequencies = case
    stream, tables = rans.encode(symbols, runs, frequencies, impl="naive"), rans.decode_tables(frequencies)
    assert np.array_equal(rans.decode(stream, runs, tables, impl="naive"), symbols)
    if native.why_missing() is None:
        for isa in ISAS:
            assert rans.encode(symbols, runs, frequencies, impl="cpu", isa=isa) == stream, isa
            assert np.array_equal(rans.decode(stream, runs, tables, impl="cpu", isa=isa), symbols), isa


@st.composite
def strips(draw) -> tuple[rans.Strips, np.ndarray]:
    """Pieces of rows of matrices of unlike lengths, in chunks, some of them empty; and frequencies for all of them."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shapes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 90)), min_size=1, max_size=3))
    matrices = [rng.integers(0, 12, shape).astype(np.uint8) for shape in shapes]
    lengths = np.concatenate([np.full(*shape) for shape in shapes])
    rows = rng.permutation(len(lengths))[: draw(st.integers(0, len(lengths)))]
    num_chunks, num_tables = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    ends = np.sort(rng.integers(0, lengths[rows][:, None] + 1, (len(rows), num_chunks + 1)), 1)
    tables = np.sort(rng.integers(0, num_tables, len(rows))).astype(np.int32)
    frequencies = rans.normalize(rng.integers(1, 50, (num_tables, 256)))
    return rans.Strips(matrices=matrices, rows=rows, tables=tables, runs=tables, ends=ends), frequencies


@settings(max_examples=60, deadline=None)
@given(strips())
def test_strips_become_the_streams_of_their_symbols(case) -> None:
    found, frequencies = case
    rows = [row for matrix in found.matrices for row in matrix]
    streams = rans.encode_strips(found, frequencies, impl="naive")
    for chunk, stream in enumerate(streams):
        symbols, runs = np.zeros(0, np.uint8), []
        for table in range(len(frequencies)):
            own = [
                rows[found.rows[i]][slice(*found.ends[i, chunk : chunk + 2])]
                for i in np.flatnonzero(found.tables == table)
            ]
            symbols = np.concatenate([symbols, *own])
            runs += [(sum(map(len, own)), table)] if own else []
        assert rans.encode(symbols, runs, frequencies, impl="naive") == stream
    if native.why_missing() is None:
        for isa in ISAS:
            assert rans.encode_strips(found, frequencies, impl="cpu", isa=isa) == streams, isa


def test_streams_longer_than_their_symbols_have_room() -> None:
    frequencies = np.ones((1, 256), np.uint16)
    frequencies[0, 0] = 4096 - 255
    symbols = np.full(5000, 7, np.uint8)  # 12 bits each
    stream = rans.encode(symbols, [(5000, 0)], frequencies)
    assert len(stream) > 7000
    assert np.array_equal(rans.decode(stream, [(5000, 0)], rans.decode_tables(frequencies)), symbols)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": np.array([0, 2])}, {"ends": np.array([[0, 5], [3, 2]])}, {"ends": np.array([[0, 5], [0, 6]])},
        {"ends": np.array([[-1, 5], [0, 5]])}, {"tables": np.array([0, 1], np.int32)}, {"tables": np.array([0, 0])},
        {"matrices": [np.zeros((2, 10), np.uint8)[:, ::2]]}, {"matrices": [np.zeros((2, 5), np.int8)]},
    ],
    ids=str,
)  # fmt: skip
def test_strips_that_lie_outside_are_refused(wrong) -> None:
    tables = np.zeros(2, np.int32)
    fields = {"matrices": [np.zeros((2, 5), np.uint8)], "rows": np.arange(2), "tables": tables, "runs": tables}
    fields |= {"ends": np.array([[0, 5], [0, 5]])} | wrong
    with pytest.raises(BadArgument, match="strips must"):
        rans.encode_strips(rans.Strips(**fields), rans.normalize(np.ones((1, 256))))


@pytest.mark.parametrize("skew", [0.0, 0.05, 0.5])
def test_a_stream_is_as_long_as_its_information(skew: float) -> None:
    weights = np.exp(-skew * np.arange(256))
    symbols = np.random.default_rng(0).choice(256, size=20_000, p=weights / weights.sum()).astype(np.uint8)
    frequencies = rans.normalize(np.bincount(symbols, minlength=256)[None])
    bits = -np.log2(frequencies[0, symbols] / 4096).sum()
    length = len(rans.encode(symbols, [(len(symbols), 0)], frequencies))
    assert bits / 8 <= length <= bits / 8 * 1.001 + rans.STREAM_BYTES + 64


def test_native_tables_are_the_oracles() -> None:
    counts = np.random.default_rng(0).integers(0, 9, (4, 256)) ** 3
    counts[3] = np.eye(1, 256, 9)
    frequencies = rans.normalize(counts)
    assert np.array_equal(rans.decode_tables(frequencies), rans.naive_tables(frequencies))


def test_histograms_count_every_symbol() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (5, 1003), np.uint8)
    expected = [np.bincount(row, minlength=256) for row in rows]
    assert np.array_equal(rans.histograms(rows), expected)
    assert np.array_equal(rans.histograms(rows[:, 3:100]), [np.bincount(row[3:100], minlength=256) for row in rows])
    assert rans.histograms(rows[:0]).shape == (0, 256)
    with pytest.raises(BadArgument, match="uint8"):
        rans.histograms(rows[0])


def test_one_symbol_takes_no_words() -> None:
    frequencies = rans.normalize(np.eye(1, 256, 7))
    assert len(rans.encode(np.full(100_000, 7, np.uint8), [(100_000, 0)], frequencies)) == rans.STREAM_BYTES


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 256))
def test_tables_add_up_and_leave_no_symbol_out(seed: int, alphabet: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 10 ** np.random.default_rng(seed).integers(1, 9), (2, 256))
    counts[:, alphabet:] = 0
    frequencies = rans.normalize(counts)
    assert (frequencies.sum(1) == 4096).all()
    assert ((frequencies > 0) >= (counts > 0)).all()


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_tampered_streams_end_in_an_error_or_in_other_symbols(isa: str) -> None:
    rng = np.random.default_rng(1)
    symbols = rng.integers(0, 20, 3_000).astype(np.uint8)
    runs = [(1_000, 0), (37, 1), (1_963, 0)]
    frequencies = rans.normalize(np.stack([np.bincount(symbols, minlength=256)] * 2))
    stream, tables = rans.encode(symbols, runs, frequencies), rans.decode_tables(frequencies)
    refused = 0
    for trial in range(400):
        data = np.frombuffer(stream, np.uint8).copy()
        kind = trial % 4
        if kind == 0:
            data = data[: rng.integers(len(data))]
        elif kind == 1:
            data = np.concatenate([data, rng.integers(0, 256, rng.integers(1, 9)).astype(np.uint8)])
        elif kind == 2:
            data[rng.integers(len(data), size=rng.integers(1, 4))] ^= np.uint8(rng.integers(1, 256))
        else:
            data = rng.integers(0, 256, rng.integers(0, 4_000)).astype(np.uint8)
        try:
            assert len(rans.decode(data, runs, tables, isa=isa)) == len(symbols)
        except DamagedFile:
            refused += 1
    assert refused > 390  # the final states are a check of 32 bits times 32


def test_what_does_not_fit_is_refused() -> None:
    frequencies = rans.normalize(np.eye(1, 256, 3))
    for impl in IMPLS:
        with pytest.raises(BadArgument, match="lacks it"):
            rans.encode(np.zeros(4, np.uint8), [(4, 0)], frequencies, impl=impl)
    with pytest.raises(BadArgument, match="sum of the runs"):
        rans.encode(np.full(4, 3, np.uint8), [(5, 0)], frequencies)
    with pytest.raises(BadArgument, match="tables"):
        rans.encode(np.full(4, 3, np.uint8), [(4, 1)], frequencies)
    with pytest.raises(BadArgument, match="add up"):
        rans.decode_tables(np.ones((1, 256), np.uint16))
