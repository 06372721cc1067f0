"""Text of a stream: never half a character, never a stop string or a part of one, and nothing lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steno.decode.loop import Step
from steno.decode.text import with_text

END = frozenset({256})


def detokenize(ids: Sequence[int]) -> str:
    """Tokens are bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def stream(data: bytes, cuts: Sequence[int], *, end: bool) -> Iterator[Step]:
    borders = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [tuple(data[a:b]) for a, b in zip(borders, borders[1:], strict=False)]
    for i, piece in enumerate(pieces):
        last = end and i == len(pieces) - 1
        yield Step(token_ids=(*piece, 256) if last else piece, nfe=i + 1)


def shown(data: bytes, cuts: Sequence[int], stop: Sequence[str], *, end: bool = True) -> list[str]:
    return [step.text for step in with_text(stream(data, cuts, end=end), detokenize, end_tokens=END, stop=stop)]


TEXTS = st.text(alphabet="ab\nQé€😀", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\nQé€😀", min_size=1, max_size=4), max_size=3)
CUTS = st.lists(st.integers(1, 100), max_size=40)


@given(text=TEXTS, stop=STOPS, cuts=CUTS, end=st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_split_of_a_text_gives_the_text_before_the_first_stop(
    text: str, stop: list[str], cuts: list[int], end: bool
) -> None:
    found = [i for i in (text.find(s) for s in stop) if i >= 0]
    # what ends first stops the stream, and of what has come by then the earliest start counts
    pieces = shown(text.encode(), cuts, stop, end=end)
    answer = "".join(pieces)
    assert "\ufffd" not in answer
    assert text.startswith(answer)
    assert not any(s in answer for s in stop)
    if not found:
        assert answer == text
    elif len(stop) == 1:
        assert answer == text[: min(found)]


@given(text=TEXTS, cuts=CUTS)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_without_stop_strings_whole_characters_come_at_once(text: str, cuts: list[int]) -> None:
    data, sent = text.encode(), 0
    pieces = shown(data, cuts, [])
    for borders, piece in zip(sorted({len(data), *(c for c in cuts if 0 < c < len(data))}), pieces, strict=False):
        sent += len(piece)
        assert sent == len(data[:borders].decode("utf-8", errors="ignore"))


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("yes. END no", ["END"], "yes. "), ("aé", ["aé"], ""), ("xaé", ["aé"], "x"), ("xab", ["aé"], "xab"),
        ("one\n\ntwo", ["\n\n"], "one"), ("aab", ["ab"], "a"), ("", ["a"], ""), ("abab", ["abc"], "abab"),
    ],
)  # fmt: skip
def test_stop_byte_by_byte(text: str, stop: list[str], expected: str) -> None:
    data = text.encode()
    assert "".join(shown(data, range(len(data)), stop)) == expected
    assert "".join(shown(data, range(len(data)), stop, end=False)) == expected


def test_nothing_is_drawn_after_a_stop() -> None:
    steps = stream(b"abcdef", range(7), end=True)
    assert "".join(step.text for step in with_text(steps, detokenize, end_tokens=END, stop=["c"])) == "ab"
    assert next(steps).token_ids == (ord("d"),)


def test_an_incomplete_character_at_the_limit_is_shown_as_it_is() -> None:
    steps = list(with_text(stream("a€".encode()[:-1], range(5), end=False), detokenize, end_tokens=END))
    assert [step.text for step in steps] == ["a", "", "", "\ufffd"]
    assert steps[-1].token_ids == ()
    assert steps[-1].nfe == 3
