"""The exception tree. Everything that steno raises on purpose is a `StenoError`; the message fits on one line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class StenoError(Exception):
    """Base of all errors that steno raises on purpose."""


class BadArgument(StenoError, ValueError):
    """A value from the caller that cannot be used; nothing was changed."""


class RecipeError(BadArgument):
    """A recipe that cannot be parsed, built or applied."""


class BudgetError(RecipeError):
    """A budget that cannot hold: zero, below what a method protects, or without a method that can meet it."""


class PromptError(BadArgument):
    """A prompt or document that the model cannot read: empty, not text, or longer than its positions."""


class ModelError(StenoError):
    """A model that cannot be found, loaded or hosted."""


class UnknownModel(ModelError, BadArgument):
    """A model name, path or file that does not exist or is none."""


class ChecksumError(ModelError):
    """A downloaded file whose SHA-256 is not the pinned one."""


class UnsupportedAttention(ModelError):
    """An attention variant that the host cannot compute exactly; it raises instead of being silently wrong."""


class CacheError(StenoError):
    """An operation that the cache cannot do in its present state."""


class IntegrityError(CacheError):
    """An invariant of the cache does not hold: a bug of ours."""


class CalibrationError(StenoError, ValueError):
    """A calibration or weights file that is damaged, or holds NaN or infinity."""


class DamagedFile(StenoError):
    """A saved context that is cut short, changed, or no saved context at all."""


class DamagedChunk(DamagedFile):
    """A part of a saved context is cut or changed, and the header, which says what was there, is whole."""


class StoreError(StenoError):
    """A store that cannot be reached, locked or written, or that is full of what is pinned."""


class KernelError(StenoError):
    """A kernel that was asked for by name and is not there."""


class StenoWarning(UserWarning):
    """Something works, but not as well or not as the caller may expect."""


MANY = 20
"""So many valid choices are no longer listed in a message."""


def nearest(name: str, choices: Iterable[str], *, where: str = "") -> str:
    """The end of an error message: the nearest valid choice, or all of them; of very many, `where` they are listed."""
    names = sorted(choices)
    match = get_close_matches(name, names, n=1, cutoff=0.5)
    if match:
        return f"did you mean {match[0]!r}?"
    return (
        f"{where} lists the {len(names)} valid ones." if where and len(names) > MANY else f"valid: {', '.join(names)}."
    )
