"""Folders in the user's cache directory: each is built once, appears whole or not at all, and is checked before use."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from steno.errors import ModelError

MANIFEST = "steno.json"
MANIFEST_FORMAT = 1

Notify = Callable[[str], None]
"""Receives one line for the user about something that takes time."""


def print_notice(line: str) -> None:
    """Print a notice on standard error."""
    print(f"steno: {line}", file=sys.stderr, flush=True)


def default_cache_dir() -> Path:
    """The user's cache directory of steno: `$XDG_CACHE_HOME/steno`, else the platform's usual place."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if xdg and Path(xdg).is_absolute():
        return Path(xdg) / "steno"
    places = {"darwin": ("Library", "Caches", "steno"), "win32": ("AppData", "Local", "steno", "Cache")}
    return Path.home().joinpath(*places.get(sys.platform, (".cache", "steno")))


def is_complete(folder: Path) -> bool:
    """Whether every file that the manifest of `folder` lists is there with its full size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["format"] != MANIFEST_FORMAT or not manifest["files"]:
            return False
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def ensure_folder(target: Path, build: Callable[[Path], None], *, need_bytes: int, notify: Notify) -> Path:
    """Return `target`, building it first if it is missing or damaged.

    `build` fills a temporary sibling folder, which is then flushed to disk and renamed. A lock file lets one process
    build while others wait. What a killed process left behind is ignored, and removed by the next build.

    Parameters
    ----------
    target
        The final folder. Nothing half-written ever carries this name.
    build
        Called with an empty folder on the same file system as `target`; writes the files into it.
    need_bytes
        Free space that the build needs at its peak, in bytes.
    notify
        Told when another process is already at it.

    Raises
    ------
    ModelError
        The folder cannot be written, or the disk is full.
    """
    if is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, notify):
            if not is_complete(target):
                _build_and_rename(target, build, need_bytes)
    except OSError as error:
        raise _folder_error(target, error, need_bytes) from error
    return target


def _locked(target: Path, notify: Notify) -> FileLock:
    lock = FileLock(target.parent / f"{target.name}.lock")
    try:
        lock.acquire(timeout=0)
        lock.release()
    except Timeout:
        notify(f"another process is preparing {target.name}; waiting for it")
    return lock


def _build_and_rename(target: Path, build: Callable[[Path], None], need_bytes: int) -> None:
    prefix = f".{target.name}.part-"
    _remove_parts(target.parent, prefix)
    if shutil.disk_usage(target.parent).free < need_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    part = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        build(part)
        _write_manifest(part)
        if target.exists():
            target.rename(Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent)) / "damaged")
        part.rename(target)
        _fsync(target.parent)
    finally:
        _remove_parts(target.parent, prefix)


def _remove_parts(parent: Path, prefix: str) -> None:
    for path in parent.iterdir():
        if path.name.startswith(prefix):
            shutil.rmtree(path, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": MANIFEST_FORMAT, "files": sizes}, indent=1) + "\n", "utf-8")
    for path in (*files, manifest, folder):
        _fsync(path)


def _fsync(path: Path) -> None:
    if os.name == "nt":  # windows flushes only handles that are open for writing, and no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _folder_error(target: Path, error: OSError, need_bytes: int) -> ModelError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = f"{need_bytes / 1e6:.0f} MB must be free in {target.parent}"
        return ModelError(f"the disk is full: {need}; free some space or choose another cache directory.")
    reason = error.strerror or str(error)
    return ModelError(f"cannot write {target}: {reason}; choose a cache directory that can be written.")
