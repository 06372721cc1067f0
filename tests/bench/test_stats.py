"""Intervals against published figures and against what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steno.bench.stats import bootstrap, difference_interval, mean_interval, newcombe, quartiles, wilson

BINARY = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=40)


def test_wilson_as_published() -> None:
    # Newcombe 1998, Statist. Med. 17:857, table I, method 3
    for (r, n), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson(r, n) == pytest.approx((low, high), abs=5e-5)


def test_newcombe_as_published() -> None:
    # Newcombe 1998, Statist. Med. 17:2635, method 10: cells e f g h, n = 50; the second follows from Wilson's interval
    for (e, f, g, h), (low, high) in {
        (36, 12, 2, 0): (0.0569, 0.3404),
        (0, 0, 0, 50): (-wilson(0, 50)[1], wilson(0, 50)[1]),
    }.items():
        pairs = [(1.0, 1.0)] * e + [(1.0, 0.0)] * f + [(0.0, 1.0)] * g + [(0.0, 0.0)] * h
        found = newcombe([x for x, _ in pairs], [y for _, y in pairs])
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@given(BINARY, st.randoms())
@settings(deadline=None)
def test_intervals_hold_their_value(scores: list[float], rng: object) -> None:
    others = [rng.choice([0.0, 1.0]) for _ in scores]  # type: ignore[attr-defined]
    for found in (mean_interval(scores), difference_interval(scores, others), difference_interval(others, scores)):
        assert found.low <= found.value <= found.high
        assert found.high - found.low > 0
    back, forth = difference_interval(scores, others), difference_interval(others, scores)
    assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
@settings(deadline=None, max_examples=20)
def test_bootstrap_is_seeded_and_holds_the_mean(values: list[float]) -> None:
    found = bootstrap(values)
    assert found == bootstrap(values)
    assert found.low <= found.value <= found.high
    assert min(values) - 1e-12 <= found.low
    assert found.high <= max(values) + 1e-12


def test_bootstrap_is_as_wide_as_the_standard_error_says() -> None:
    values = np.random.default_rng(1).random(200)
    found = bootstrap(values.tolist())
    half = 1.96 * values.std() / 200**0.5
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])


def test_which_method_where() -> None:
    assert mean_interval([0, 1, 1]).method == "wilson"
    assert mean_interval([0, 0.5]).method == "bootstrap"
    assert difference_interval([0, 1], [1, 1]).method == "newcombe"
    assert difference_interval([0, 0.5], [1, 1]).method == "bootstrap"
    assert quartiles([1, 2, 3, 4, 5]) == (2, 3, 4)
