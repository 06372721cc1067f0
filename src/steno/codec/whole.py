"""Files that appear whole or not at all, and that only their owner can read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from steno.errors import BadArgument

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700


def write_whole(path: Path, parts: Iterable[Any], *, temporary: Path | None = None) -> int:
    """Writes bytes-like parts to a file: under another name, flushed, then renamed. Its bytes.

    temporary: that other name, in the same folder, which no one else may write at the same time; what lies there is
    overwritten. None: a name of its own. Raises `BadArgument` if the file cannot be written.
    """
    written = None
    try:
        make_folder(path.parent)
        if temporary is None:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")  # mode 0600
            written = Path(name)
        else:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE_FILE)
            written = temporary
        with os.fdopen(handle, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
            num_bytes = file.tell()
        os.replace(written, path)
        written = None
        sync_folder(path.parent)
    except OSError as error:
        raise BadArgument(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if written is not None:
            written.unlink(missing_ok=True)
    return num_bytes


def make_folder(folder: Path) -> None:
    """Makes a folder that only its owner can open, and those above it that are not there."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    if os.name == "nt":  # windows flushes no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
