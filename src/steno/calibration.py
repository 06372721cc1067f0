"""Calibration files: small tensors that a method gathered once, in safetensors; checked whenever they are read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steno.errors import CalibrationError

MAX_CALIBRATION_BYTES = 1 << 30
ABOUT = "about"


def load_calibration(path: str | Path, names: tuple[str, ...]) -> Mapping[str, Tensor]:
    """The named tensors of a calibration file, as fp32.

    Raises CalibrationError if the file is not there, is damaged or too large, lacks a tensor, or holds NaN or infinity.
    """
    place = Path(path).expanduser()
    try:
        status = place.stat()
    except OSError:
        raise CalibrationError(
            f"no such calibration file: {place}; make it with `steno calibrate` or `steno train`."
        ) from None
    if status.st_size > MAX_CALIBRATION_BYTES:
        raise CalibrationError(
            f"{place} has {status.st_size} bytes; a calibration file has at most {MAX_CALIBRATION_BYTES}."
        )
    return _load(place, status.st_mtime_ns, names)


@lru_cache(maxsize=4)
def _load(place: Path, changed_ns: int, names: tuple[str, ...]) -> Mapping[str, Tensor]:
    try:
        with safe_open(place, framework="pt") as file:
            missing = sorted(set(names) - set(file.keys()))
            if missing:
                raise CalibrationError(f"{place} lacks {', '.join(missing)}; make it anew.")
            tensors = {name: file.get_tensor(name).float() for name in names}
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{place} is not a readable safetensors file: {' '.join(str(error).split())}") from None
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CalibrationError(
                f"{place}: {name} holds NaN or infinity in {bad} of {tensor.numel()} values; make it anew."
            )
    return tensors


def read_about(path: str | Path) -> dict[str, str]:
    """What a calibration file was made from; raises CalibrationError if it does not say."""
    try:
        with safe_open(Path(path).expanduser(), framework="pt") as file:
            about = json.loads((file.metadata() or {})[ABOUT])
    except (SafetensorError, OSError, KeyError, ValueError):
        raise CalibrationError(f"{path} does not say what it was made from; make it anew.") from None
    return {str(key): str(value) for key, value in dict(about).items()}


def save_calibration(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Writes a calibration file, whole or not at all; `about` says what it was made from.

    Raises CalibrationError if it cannot be written.
    """
    place = Path(path).expanduser()
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=place.name, suffix=".part")
        os.close(handle)
        # one entry, since safetensors leaves the order of several to chance, and the same run is to make the same file
        metadata = {ABOUT: json.dumps(dict(about), sort_keys=True)}
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary, metadata=metadata)
        os.replace(temporary, place)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"cannot write {place}: {' '.join(str(error).split())}") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
