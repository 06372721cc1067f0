"""Budgets: what a sequence may keep, and their text form, `512`, `20%`, `64MiB`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import cast, final

from steno.errors import BudgetError
from steno.methods.checks import shown

_UNITS = {
    unit.lower(): size
    for unit, size in [("B", 1)]
    + [(f"{prefix}B", 1000**power) for power, prefix in enumerate("kMGT", 1)]
    + [(f"{prefix}iB", 1024**power) for power, prefix in enumerate("KMGT", 1)]
}
_NUMBER = re.compile(r"([0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})\s*(%|[A-Za-z]*)", re.ASCII)
_EXAMPLES = "write tokens per KV head (`512`), a share of the prompt (`20%`) or bytes (`64MiB`)"


def _share(value: object) -> Fraction:
    """A share above 0 and at most 1, to 12 decimals."""
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction) or math.isnan(value):
        raise BudgetError(f"a share of the prompt must be a number; got share={shown(value)}.")
    if not 0 < value <= 1:
        raise BudgetError(f"a share of the prompt must be above 0% and not over 100%; got {float(value):.6%}.")
    share = Fraction(round(Fraction(str(value)) * 10**12), 10**12)
    if share == 0:
        raise BudgetError(f"a share of the prompt must be above 0%; got share={shown(value)}.")
    return share


@final
@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a sequence may keep; exactly one of the three is given.

    Parameters
    ----------
    tokens : int
        Tokens per KV head, on average.
    share : Fraction or float
        Share of the prompt, above 0 and at most 1; kept exactly to 12 decimals.
    bytes : int
        Bytes of the whole sequence, all layers.

    Raises
    ------
    BudgetError
        If not exactly one is given, or it is of another type or out of range.
    """

    tokens: int | None = None
    share: Fraction | float | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        if len(given) != 1:
            raise BudgetError(f"a budget is one of tokens, share and bytes; got {', '.join(given) or 'none'}.")
        [(name, value)] = given.items()
        whole = isinstance(value, int) and not isinstance(value, bool)
        if name == "share":
            object.__setattr__(self, "share", _share(value))
        elif not whole or not 0 < value < 2**63:
            raise BudgetError(f"a budget in {name} must be a whole number > 0; got {name}={shown(value)}.")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget from its text form: `512`, `20%`, `64MiB`, `1.5GiB`, `800kB`."""
        match = _NUMBER.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            negative = isinstance(text, str) and text.strip().startswith("-")
            raise BudgetError(f"a budget must be {'> 0' if negative else 'readable'}: {_EXAMPLES}; got {shown(text)}.")
        number, unit = Fraction(match[1].rstrip(".")), match[2].lower()
        if unit == "%":
            return cls(share=number / 100)
        if unit == "" and "." in match[1]:
            raise BudgetError(f"never a bare ratio: write 20% or a number of tokens; got {shown(text)}.")
        if unit == "":
            return cls(tokens=int(number))
        if unit not in _UNITS:
            raise BudgetError(f"unknown unit {shown(match[2])} of a budget: {_EXAMPLES}.")
        return cls(bytes=int(number * _UNITS[unit]))

    def __str__(self) -> str:
        if self.tokens is not None:
            return str(self.tokens)
        if self.bytes is not None:
            size, unit = max((size, unit) for unit, size in _UNITS.items() if self.bytes % size == 0)
            return f"{self.bytes // size}{_spelled(unit)}"
        percent = cast(Fraction, self.share) * 100
        digits = f"{percent.numerator * 10**10 // percent.denominator:011d}"
        return f"{digits[:-10]}.{digits[-10:]}".rstrip("0").rstrip(".") + "%"


WHOLE = Budget(share=Fraction(1))
"""The budget that drops nothing."""


def _spelled(unit: str) -> str:
    """The usual spelling of a unit: B, kB, MB, KiB, MiB."""
    return unit.upper().replace("IB", "iB") if unit != "kb" else "kB"
