"""Where the weights of methods lie: shipped with steno for the embedded model, in the cache directory for others."""

from __future__ import annotations

from pathlib import Path

from steno.errors import CalibrationError
from steno.models.folder_cache import default_cache_dir

SHIPPED = Path(__file__).parent.parent / "methods" / "weights"


def learned_file(method_id: str, model_hash: str) -> Path:
    """Where `steno train` and `steno calibrate` write what a method learned of a model, if they are not told another place."""
    return default_cache_dir() / "learned" / f"{method_id}-{model_hash}.safetensors"


def known_file(method_id: str, model_hash: str | None) -> str | None:
    """The file of what a method learned of a model: the user's own first, then what steno ships; None if there is none."""
    if model_hash is None:
        return None
    own = learned_file(method_id, model_hash)
    return next((str(place) for place in (own, SHIPPED / own.name) if place.is_file()), None)


def find_weights(method_id: str, model_hash: str | None, command: str) -> str:
    """The file of what a method learned of a model: the user's own first, then what steno ships.

    Raises CalibrationError, with the command that makes it, if there is none.
    """
    if model_hash is None:
        raise CalibrationError(
            f"{method_id} needs what it learned of this model: read with steno.load(...).read(...), which finds it, or name "
            f"the file that `steno {command} {method_id} --model M --out FILE` wrote, {method_id}(weights='FILE')."
        )
    found = known_file(method_id, model_hash)
    if found is not None:
        return found
    raise CalibrationError(
        f"{method_id} has learned nothing of this model yet: run `steno {command} {method_id} --model M` once, or name a "
        f"file, {method_id}(weights='FILE')."
    )
