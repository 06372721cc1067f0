"""The simulator of loading: time over a trace is exact, and the controller keeps deadlines that fixed policies miss."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from steno.store.loading import RECOMPUTE, LoadableChunk
from test_benchmarks import script


@pytest.fixture(scope="module")
def loading():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield script("loading")


def test_bytes_arrive_when_the_trace_says(loading) -> None:
    trace = loading.Trace(((1.0, 100.0), (2.0, 0.0), (1.0, 50.0)))  # 150 bytes in 4 s
    for start, num_bytes, arrival in [
        (0, 0, 0), (0, 50, 0.5), (0, 100, 1), (0, 125, 3.5), (0, 150, 4), (0, 151, 4.01), (1, 1, 3.02), (2.5, 50, 4),
        (2.5, 60, 4.1), (4.5, 50, 5), (0, 1500, 40), (0.5, 1500, 40.5), (3.5, 1525, 44),
    ]:  # fmt: skip
        assert trace.arrival(start, num_bytes) == pytest.approx(arrival)


def test_a_trace_is_read_as_it_was_written(loading, tmp_path: Path) -> None:
    trace = loading.Trace(((0.5, 1000.0), (1.25, 20.0)))
    trace.write(tmp_path / "a.trace")
    assert loading.Trace.read(tmp_path / "a.trace") == trace
    (tmp_path / "b.trace").write_text("# none\n")
    with pytest.raises(ValueError, match="stretches"):
        loading.Trace.read(tmp_path / "b.trace")
    with pytest.raises(ValueError, match="bytes come"):
        loading.Trace(((1.0, 0.0),))


def test_a_link_is_recorded(loading, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    loading.record(f"file://{tmp_path}/large", tmp_path / "a.trace")
    stretches = loading.Trace.read(tmp_path / "a.trace").stretches
    assert sum(seconds * rate for seconds, rate in stretches) == pytest.approx(1 << 20, rel=0.05)


def test_fetching_overlaps_decoding_and_text_waits(loading) -> None:
    chunks = [LoadableChunk(num_tokens=100, level_bytes=(100,))] * 3
    trace, speeds = loading.Trace(((1.0, 100.0),)), {"read_tok_per_s": 50.0, "decode_tok_per_s": 200.0}
    assert loading.simulate(chunks, trace, lambda i, t: 0, **speeds).seconds == pytest.approx(3.5)
    assert loading.simulate(chunks, trace, lambda i, t: RECOMPUTE, **speeds).seconds == pytest.approx(6)
    mixed = loading.simulate(chunks, trace, lambda i, t: [0, RECOMPUTE, 0][i], **speeds)
    assert mixed.seconds == pytest.approx(1.5 + 2 + 1.5)


def test_the_controller_keeps_deadlines_that_fixed_policies_miss(loading) -> None:
    arguments = SimpleNamespace(
        level_bits=loading.LEVEL_BITS, values_per_token=loading.VALUES_PER_TOKEN, tokens=4096, trace=None, runs=20,
        read_tok_per_s=loading.READ_TOK_PER_S, decode_tok_per_s=loading.DECODE_TOK_PER_S, deadline=2.0,
    )  # fmt: skip
    rows = {(row["link"], row["policy"]): row for row in loading.compare(arguments)}
    links, fixed = {link for link, _ in rows}, {policy for _, policy in rows} - {"controller"}
    missed = {p: sum(rows[link, p]["missed"] for link in links) for p in {*fixed, "controller"}}
    assert missed["controller"] <= min(missed[p] for p in fixed) + 0.5
    bits = {p: sum(rows[link, p]["bits_per_value"] for link in links) for p in missed}
    as_punctual = [p for p in fixed if missed[p] <= missed["controller"] + 0.5]
    assert all(bits["controller"] > bits[p] for p in as_punctual), "what is as punctual is worse"
    assert rows["steady 1 GB/s", "controller"]["bits_per_value"] > 0.9 * loading.LEVEL_BITS[0]
    assert (
        rows["drops from 100 to 5 MB/s", "controller"]["missed"] < rows["drops from 100 to 5 MB/s", "level 0"]["missed"]
    )
