"""Budgets: what a sequence may keep, and their text form, `512`, `20%`, `64MiB`, `20% of bytes`."""

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
_NUMBER = re.compile(r"([0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})\s*(%(?:\s*of\s+bytes)?|[A-Za-z]*)", re.ASCII)
_EXAMPLES = (
    "write tokens per KV head (`512`), a share of the prompt (`20%`), bytes (`64MiB`) or a share of the bytes that the "
    "prompt would take (`20% of bytes`)"
)
_SHARES = {"share": "prompt", "bytes_share": "bytes"}


def _share(name: str, value: object) -> Fraction:
    """A share above 0 and at most 1, to 12 decimals."""
    whole = _SHARES[name]
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction) or math.isnan(value):
        raise BudgetError(f"a share of the {whole} must be a number; got {name}={shown(value)}.")
    if not 0 < value <= 1:
        raise BudgetError(f"a share of the {whole} must be above 0% and not over 100%; got {float(value):.6%}.")
    share = Fraction(round(Fraction(str(value)) * 10**12), 10**12)
    if share == 0:
        raise BudgetError(f"a share of the {whole} must be above 0%; got {name}={shown(value)}.")
    return share


@final
@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a sequence may keep; exactly one of the four is given.

    Parameters
    ----------
    tokens : int
        Tokens per KV head, on average.
    share : Fraction or float
        Share of the prompt, above 0 and at most 1; kept exactly to 12 decimals.
    bytes : int
        Bytes of the whole sequence, all layers that the recipe compresses; those of sliding windows hold theirs beside it.
    bytes_share : Fraction or float
        Share of the bytes that the prompt takes in these layers of a full cache of the model's dtype, above 0 and at most
        1. Like `bytes` it counts everything that is held, and so includes what a method stores beside the tokens.

    Raises
    ------
    BudgetError
        If not exactly one is given, or it is of another type or out of range.
    """

    tokens: int | None = None
    share: Fraction | float | None = None
    bytes: int | None = None
    bytes_share: Fraction | float | None = None

    def __post_init__(self) -> None:
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        if len(given) != 1:
            raise BudgetError(
                f"a budget is one of tokens, share, bytes and bytes_share; got {', '.join(given) or 'none'}."
            )
        [(name, value)] = given.items()
        whole = isinstance(value, int) and not isinstance(value, bool)
        if name in _SHARES:
            object.__setattr__(self, name, _share(name, value))
        elif not whole or not 0 < value < 2**63:
            raise BudgetError(f"a budget in {name} must be a whole number > 0; got {name}={shown(value)}.")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget from its text form: `512`, `20%`, `64MiB`, `1.5GiB`, `800kB`, `20% of bytes`."""
        match = _NUMBER.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            negative = isinstance(text, str) and text.strip().startswith("-")
            raise BudgetError(f"a budget must be {'> 0' if negative else 'readable'}: {_EXAMPLES}; got {shown(text)}.")
        number, unit = Fraction(match[1].rstrip(".")), match[2].lower()
        if unit == "%":
            return cls(share=number / 100)
        if unit.startswith("%"):
            return cls(bytes_share=number / 100)
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
        percent = cast(Fraction, self.bytes_share if self.share is None else self.share) * 100
        digits = f"{percent.numerator * 10**10 // percent.denominator:011d}"
        number = f"{digits[:-10]}.{digits[-10:]}".rstrip("0").rstrip(".")
        return f"{number}%" if self.bytes_share is None else f"{number}% of bytes"

    @property
    def in_bytes(self) -> bool:
        """Whether bytes are what is limited, all that is held together, and not tokens."""
        return self.bytes is not None or self.bytes_share is not None

    def layer_bytes(self, full_bytes: int, num_layers: int) -> int:
        """What one layer may take of a budget in bytes. full_bytes: of the prompt in a layer of a full cache."""
        if self.bytes_share is not None:
            return int(full_bytes * self.bytes_share)
        return (self.bytes or 0) // num_layers


WHOLE = Budget(share=Fraction(1))
"""The budget that drops nothing."""


def _spelled(unit: str) -> str:
    """The usual spelling of a unit: B, kB, MB, KiB, MiB."""
    return unit.upper().replace("IB", "iB") if unit != "kb" else "kB"
