"""Checks that every method makes of its own arguments: the value is named, and nothing is coerced."""

from __future__ import annotations

import math
from collections.abc import Collection

from steno.errors import BadArgument

MAX_INT = 2**31 - 1


def require_int(name: str, value: object, low: int, high: int = MAX_INT) -> None:
    """Raise BadArgument unless `value` is an int (not a bool) in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadArgument(f"`{name}` must be a whole number; got {name}={shown(value)}.")
    if value < low:
        raise BadArgument(f"`{name}` must be >= {low}; got {name}={shown(value)}.")
    if value > high:
        raise BadArgument(f"`{name}` must be <= {high}; got {name}={shown(value)}.")


def require_multiple(name: str, value: object, unit: int) -> None:
    """Raise BadArgument unless `value` is a whole number above 0 and a multiple of `unit`."""
    require_int(name, value, unit)
    assert isinstance(value, int)
    if value % unit:
        raise BadArgument(f"`{name}` must be a multiple of {unit}; got {name}={value}.")


def require_real(name: str, value: object, low: float, high: float) -> None:
    """Raise BadArgument unless `value` is a finite int or float (not a bool) in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value in (math.inf, -math.inf):
        raise BadArgument(f"`{name}` must be a finite number; got {name}={shown(value)}.")
    if not low <= value <= high:  # NaN is in no range
        raise BadArgument(f"`{name}` must be between {low:g} and {high:g}; got {name}={shown(value)}.")


def require_bool(name: str, value: object) -> None:
    """Raise BadArgument unless `value` is True or False."""
    if not isinstance(value, bool):
        raise BadArgument(f"`{name}` must be True or False; got {name}={shown(value)}.")


def require_text(name: str, value: object) -> None:
    """Raise BadArgument unless `value` is text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise BadArgument(f"`{name}` must be text; got {name}={shown(value)}.")


def require_choice(name: str, value: object, choices: Collection[int] | Collection[str]) -> None:
    """Raise BadArgument unless `value` is one of `choices`, of the same type."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise BadArgument(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {name}={shown(value)}.")


def shown(value: object, width: int = 60) -> str:
    """`repr(value)` on one line, cut at `width` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= width else text[: width - 3] + "..."
