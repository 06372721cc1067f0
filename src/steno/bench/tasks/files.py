"""Reading a user's file: what is wrong is told with file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steno.errors import PromptError


def read_text(path: Path) -> str:
    """Text of a file in UTF-8. Raises PromptError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PromptError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise PromptError(f"{path} is a folder; name one file.") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not text in UTF-8 (byte {error.start}).") from None
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror or error}") from None


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a JSONL file with their line numbers from 1; empty lines are skipped.

    Raises PromptError with file and line if a line is not a JSON object.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise PromptError(f"{path}, line {number}: not JSON ({error}).") from None
        if not isinstance(value, dict):
            raise PromptError(f"{path}, line {number}: must be an object; got {type(value).__name__}.")
        yield number, value


def text_field(path: Path, number: int, row: dict[str, Any], name: str, *, empty: bool = False) -> str:
    """A string of a row. Raises PromptError with file and line if it is missing, no string, or empty where it must not be."""
    value = row.get(name)
    if not isinstance(value, str) or (not empty and not value.strip()):
        got = "nothing" if name not in row else repr(value)[:60]
        raise PromptError(f"{path}, line {number}: `{name}` must be {'' if empty else 'non-empty '}text; got {got}.")
    return value


def answers_field(path: Path, number: int, row: dict[str, Any], name: str = "answers") -> tuple[str, ...]:
    """A list of strings of a row; a single string counts as a list of one."""
    value = row.get(name)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(a, str) and a for a in values):
        got = "nothing" if name not in row else repr(value)[:60]
        raise PromptError(f"{path}, line {number}: `{name}` must be a list of non-empty texts; got {got}.")
    return tuple(values)
