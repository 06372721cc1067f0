"""Where a document comes from: a file, standard input, or the Python language reference that every machine has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from steno.errors import PromptError

REFERENCE_TOPIC = "compound"
REFERENCE_TOKENS = 2000
MAX_DOCUMENT_BYTES = 256 * 1024 * 1024


def read_document(name: str) -> str:
    """Text of a file, or of standard input for `-`.

    Raises PromptError if there is no such file, or it is not text in UTF-8.
    """
    try:
        if name == "-":
            data = sys.stdin.buffer.read(MAX_DOCUMENT_BYTES + 1)
        else:
            path = Path(name)
            if path.is_dir():
                raise PromptError(f"{name} is a folder; name one text file.")
            with path.open("rb") as file:
                data = file.read(MAX_DOCUMENT_BYTES + 1)
    except FileNotFoundError:
        raise PromptError(f"no such file: {name}") from None
    except OSError as error:
        raise PromptError(f"cannot read {name}: {error.strerror or error}") from None
    if len(data) > MAX_DOCUMENT_BYTES:
        raise PromptError(f"{name} is larger than {MAX_DOCUMENT_BYTES >> 20} MiB, more than any model reads; cut it.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{name} is not text in UTF-8 (byte {error.start} is 0x{data[error.start]:02x}).") from None
    if "\0" in text:
        raise PromptError(f"{name} is not text: it has a zero byte at position {text.index(chr(0))}.")
    if not text.strip():
        raise PromptError(f"{name} is empty; give it some text to read.")
    return text


def language_reference(count_tokens: Callable[[str], int]) -> tuple[str, str]:
    """The beginning of a chapter of the running interpreter's language reference, and what it is in words."""
    from pydoc_data.topics import topics

    paragraphs = topics[REFERENCE_TOPIC].split("\n\n")
    low, high = 1, len(paragraphs)
    while low < high:  # the most paragraphs whose tokens fit
        middle = (low + high + 1) // 2
        if count_tokens("\n\n".join(paragraphs[:middle])) <= REFERENCE_TOKENS:
            low = middle
        else:
            high = middle - 1
    text = "\n\n".join(paragraphs[:low])
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        text,
        f"the first {count_tokens(text)} tokens of 'Compound statements' in the Python {version} language reference",
    )


def whole_reference() -> tuple[str, str]:
    """All chapters of the running interpreter's language reference, and what it is in words."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return text, f"the Python {sys.version_info.major}.{sys.version_info.minor} language reference"
