"""How far an interrupted run had come: its tensors, how many steps or layers they are of, and which run it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steno.calibration import load_calibration, read_about, save_calibration
from steno.errors import CalibrationError
from steno.learn.options import Options


def write(place: Path, state: Mapping[str, Tensor], done: int, identity: str) -> None:
    """Writes a checkpoint, whole or not at all."""
    save_calibration(place, state, {"done": str(done), "identity": identity})


def read(options: Options, total: int) -> tuple[int, Mapping[str, Tensor]]:
    """How many of `total` are done, and the tensors, fp32, that were there then; 0 and none without a checkpoint.

    Raises CalibrationError if it is damaged, no checkpoint, or that of another run.
    """
    place = options.checkpoint
    if place is None or not place.exists():
        return 0, {}
    load_calibration(place, ())  # its errors are clearer
    try:
        about = read_about(place)
        with safe_open(place, framework="pt") as file:
            names = tuple(file.keys())
        done = int(about["done"])
    except (CalibrationError, SafetensorError, OSError, KeyError, ValueError):
        raise CalibrationError(f"{place} is not a checkpoint of ours; start without --resume.") from None
    if about.get("identity") != options.identity or not 0 < done < total:
        raise CalibrationError(
            f"{place} is the checkpoint of another run; start without --resume, or with its arguments."
        )
    return done, load_calibration(place, names)


def by_layer(
    num_layers: int, fit: Callable[[int], Mapping[str, Tensor]], options: Options, *, before: int = 0
) -> dict[str, Tensor]:
    """What `fit(layer_idx)` finds, fp32, stacked over the layers; a checkpoint is written after each and gone on from.

    before: steps of the progress that are done already. Raises CalibrationError as `read` does.
    """
    done, state = read(options, num_layers)
    found = [{name: x[i] for name, x in state.items()} for i in range(done)]
    for layer_idx in range(done, num_layers):
        options.report("fitting", before + layer_idx, before + num_layers)
        found.append({name: x.float().cpu() for name, x in fit(layer_idx).items()})
        if options.checkpoint is not None and layer_idx + 1 < num_layers:
            write(options.checkpoint, _stacked(found), layer_idx + 1, options.identity)
    options.report("fitting", before + num_layers, before + num_layers)
    return _stacked(found)


def _stacked(layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
