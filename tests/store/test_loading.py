"""The controller that loads in time: the card's invariants, and how loading overlaps."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steno.errors import BadArgument
from steno.store.loading import RECOMPUTE, LoadableChunk, LoadController, load_chunks

LEVELS = (1000, 500, 250, 100)
CHUNKS = [LoadableChunk(num_tokens=256, level_bytes=LEVELS)] * 10


def controller(deadline_s: float, **speeds: float) -> LoadController:
    return LoadController(CHUNKS, deadline_s=deadline_s, **{"fill": 1.0} | speeds)


def goodness(way: int) -> int:
    """0 is the best; text counts as the best level does."""
    return 0 if way == RECOMPUTE else way


def test_an_endless_link_brings_the_best_level_and_none_the_text() -> None:
    assert controller(1.0, bytes_per_s=1e12, read_tok_per_s=100).choose(0, 0.0) == 0
    assert controller(1.0, bytes_per_s=0, read_tok_per_s=100).choose(0, 0.0) == RECOMPUTE
    assert controller(100.0, bytes_per_s=0, read_tok_per_s=100).choose(0, 0.0) == RECOMPUTE


def test_the_best_level_that_meets_the_deadline_is_taken() -> None:
    for deadline_s, way in [(10.0, 0), (9.9, 1), (5.0, 1), (4.9, 2), (2.5, 2), (1.0, 3), (0.1, 3)]:
        assert controller(deadline_s, bytes_per_s=1000, read_tok_per_s=1).choose(0, 0.0) == way
        later = controller(deadline_s + 7, bytes_per_s=1000, read_tok_per_s=1)
        assert later.choose(0, 7.0) == way
    assert controller(5.0, bytes_per_s=1000, read_tok_per_s=1).choose(8, 3.0) == 0, "of the rest alone"


def test_text_is_read_where_that_is_faster_than_the_best_level_or_all_that_is_in_time() -> None:
    assert controller(60.0, bytes_per_s=1000, read_tok_per_s=300).choose(0, 0.0) == RECOMPUTE
    assert controller(60.0, bytes_per_s=1000, read_tok_per_s=200).choose(0, 0.0) == 0
    assert controller(0.1, bytes_per_s=10, read_tok_per_s=2000).choose(0, 0.0) == RECOMPUTE


def test_decoding_counts_where_it_is_slower() -> None:
    slow = controller(10.0, bytes_per_s=1e9, read_tok_per_s=1, decode_tok_per_s=256)
    assert slow.seconds(0, 3) == slow.seconds(0, 0) == 11.0
    assert slow.choose(0, 0.0) == 0, "a worse level would come no sooner"
    assert controller(9.0, bytes_per_s=1000, read_tok_per_s=1, decode_tok_per_s=256 * 2).choose(0, 0.0) == 1
    assert controller(9.0, bytes_per_s=1000, read_tok_per_s=1, decode_tok_per_s=256 * 4).seconds(0, 0) == 10.25


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 10**7), min_size=1, max_size=6),
    bytes_per_s=st.floats(0, 1e9), read=st.floats(0, 1e5), decode=st.none() | st.floats(1, 1e6),
    deadlines=st.tuples(st.floats(0, 100), st.floats(0, 100)), idx=st.integers(0, 9),
)  # fmt: skip
def test_a_later_deadline_never_brings_a_worse_level(
    sizes: list[int], bytes_per_s: float, read: float, decode: float | None, deadlines: tuple[float, float], idx: int
) -> None:
    chunks = [LoadableChunk(num_tokens=256, level_bytes=tuple(sorted(sizes, reverse=True)))] * 10
    ways = []
    for deadline_s in sorted(deadlines):
        found = LoadController(
            chunks,
            deadline_s=deadline_s,
            fill=1.0,
            bytes_per_s=bytes_per_s,
            read_tok_per_s=read,
            decode_tok_per_s=decode,
        )
        ways.append(found.choose(idx, 0.0))
        if found.seconds(idx, ways[-1]) > deadline_s:  # then nothing would be in time, and it is the fastest
            assert found.seconds(idx, ways[-1]) == min(
                found.seconds(idx, way) for way in (RECOMPUTE, *range(len(sizes)))
            )
        else:
            assert all(found.seconds(idx, way) > deadline_s for way in range(1, goodness(ways[-1])))
    if found.seconds(idx, ways[0]) <= min(deadlines):
        assert goodness(ways[1]) <= goodness(ways[0])


def test_without_any_knowledge_the_middle_level_comes_first() -> None:
    found = controller(1.0)
    assert found.choose(0, 0.0) == 2
    found.fetched(250, 0.001)
    assert found.choose(1, 0.001) == 0
    found.fetched(250, 10.0)
    assert found.choose(2, 0.5) == 3
    assert LoadController([LoadableChunk(num_tokens=1, level_bytes=())], deadline_s=1).choose(0, 0.0) == RECOMPUTE


def test_a_link_is_as_fast_as_it_was_lately_or_just_now() -> None:
    found = controller(1.0)
    for seconds, speed in [
        (1.0, 1000),
        (0.1, 2000 / 1.1),
        (0.1, 3000 / 1.2),
        (5.0, 200),
        (0.1, 4000 / 5.3),
        (0.1, 4000 / 5.3),
    ]:
        found.fetched(1000, seconds)
        assert found.bytes_per_s == pytest.approx(speed)
    for _ in range(4):
        found.fetched(1000, 0.1)
    assert found.bytes_per_s == pytest.approx(10_000), "what is long ago counts no more"


def test_a_plan_leaves_room_for_a_slower_link() -> None:
    assert controller(10.0, bytes_per_s=1000, read_tok_per_s=1, fill=1.0).choose(0, 0.0) == 0
    assert controller(10.0, bytes_per_s=1000, read_tok_per_s=1, fill=0.75).choose(0, 0.0) == 1
    assert controller(14.0, bytes_per_s=1000, read_tok_per_s=1, fill=0.75).choose(0, 0.0) == 0


def test_wrong_arguments() -> None:
    with pytest.raises(BadArgument, match="levels"):
        LoadController([CHUNKS[0], LoadableChunk(num_tokens=1, level_bytes=(1,))], deadline_s=1)
    with pytest.raises(BadArgument):
        controller(-1.0)
    with pytest.raises(BadArgument):
        controller(float("nan"))
    with pytest.raises(BadArgument, match="fill"):
        controller(1.0, fill=0)
    with pytest.raises(BadArgument):
        LoadableChunk(num_tokens=0, level_bytes=())


def test_fetching_goes_on_while_the_chunk_before_is_decoded() -> None:
    decoding, fetched, order = threading.Event(), threading.Event(), []

    def fetch(idx: int, level: int) -> bytes:
        if idx == 1:
            assert decoding.wait(10), "chunk 0 is decoded meanwhile"
            fetched.set()
        return bytes(LEVELS[level])

    def decode(idx: int, level: int, data: bytes) -> None:
        if idx == 0:
            decoding.set()
            assert fetched.wait(10), "chunk 1 is fetched meanwhile"
        order.append(idx)

    found = LoadController(CHUNKS[:4], deadline_s=100, bytes_per_s=1e9)
    assert load_chunks(found, fetch, decode, lambda idx: None) == [0] * 4
    assert order == [0, 1, 2, 3]
    assert found.decode_tok_per_s is not None


def test_text_is_read_when_all_before_it_is_there() -> None:
    done: list[int] = []

    def decode(idx: int, level: int, data: bytes) -> None:
        time.sleep(0.01)
        done.append(idx)

    def recompute(idx: int) -> None:
        assert done == [*range(idx)]
        done.append(idx)

    def fetch(idx: int, level: int) -> bytes:
        if idx == 2:
            time.sleep(0.2)  # the link breaks down
        return bytes(LEVELS[level])

    found = LoadController(CHUNKS[:6], deadline_s=100, read_tok_per_s=256 * 20, bytes_per_s=1e7)
    ways = load_chunks(found, fetch, decode, recompute)
    assert ways[:3] == [0, 0, 0]
    assert ways[3] == RECOMPUTE
    assert done == [*range(6)]


def test_what_fails_is_told() -> None:
    def broken(*arguments: object) -> bytes:
        raise OSError("gone")

    for fetch, decode in ((broken, lambda *x: None), (lambda i, level: b"", broken)):
        with pytest.raises(OSError, match="gone"):
            load_chunks(LoadController(CHUNKS[:2], deadline_s=9, bytes_per_s=9), fetch, decode, lambda idx: None)  # type: ignore[arg-type]
