"""Random layers, everything that a host could have seen of them, and random files for methods that learn."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steno import pipeline
from steno.calibration import save_calibration
from steno.methods import Scorer
from steno.methods.quantize.commvq import CENTRES, num_stages
from steno.recipe import Recipe, parse_recipe
from steno.types import LayerKV, Observation, Rope

FOLDER = tempfile.TemporaryDirectory()
WIDTH, INNER, LAYERS = 5, 6, 4
LEARNED: dict[str, Callable[[int, int, int, int], dict[str, tuple[int, ...]]]] = {
    "locret": lambda layers, hkv, group, dim: {
        "w1": (layers, INNER, (group + 2) * hkv * dim), "w2": (layers, hkv, INNER),
    },
    "trim_kv": lambda layers, hkv, group, dim: {
        "w1": (layers, INNER, WIDTH), "b1": (layers, INNER), "w2": (layers, hkv, INNER), "bias": (layers, hkv),
    },
    "prefixkv": lambda layers, hkv, group, dim: {"curves": (layers, 101)},
    "commvq": lambda layers, hkv, group, dim: {
        "key_centres": (layers, hkv, num_stages(dim, 2), CENTRES, dim),
        "value_rows_2": (layers, hkv, 2 * dim + 1, dim), "value_rows_1": (layers, hkv, dim + 1, dim),
    },
    "razorattention": lambda layers, hkv, group, dim: {"induction": (layers, hkv), "echo": (layers, hkv)},
}  # fmt: skip
"""Shapes of what a method learns of a layer of `make_layer`."""


@cache
def learned_file(method_id: str, layers: int, hkv: int, group: int, dim: int) -> str:
    """A file with random weights for a method, in a folder that goes with the process."""
    g = torch.Generator().manual_seed(0)
    shapes = LEARNED[method_id](layers, hkv, group, dim)
    place = Path(FOLDER.name) / f"{method_id}-{layers}-{hkv}-{group}-{dim}.safetensors"
    save_calibration(place, {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}, {})
    return str(place)


def with_weights(method: Any, *, layers: int = LAYERS, hkv: int = 2, group: int = 3, dim: int = 8) -> Any:
    """The method with what it learned of layers of this shape, if it learns."""
    if method.id not in LEARNED:
        return method
    return dataclasses.replace(method, weights=learned_file(method.id, layers, hkv, group, dim))


def with_files(recipe: str, *, layers: int, hkv: int, group: int = 2, dim: int) -> Recipe:
    """The recipe, with random weights of a model of this shape for the stages that learn."""
    return pipeline.with_weights(
        parse_recipe(recipe), lambda method_id, command: learned_file(method_id, layers, hkv, group, dim)
    )


def make_layer(
    num_tokens: int, *, hkv: int = 2, group: int = 3, dim: int = 8, window: int = 4, budget: int = 6,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[LayerKV, Observation]:  # fmt: skip
    """A random layer and everything that a host could have seen of it."""
    g = torch.Generator().manual_seed(seed)
    heads = hkv * group

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    root = draw(heads, dim, dim) / 4
    kv = LayerKV(
        keys=draw(hkv, num_tokens, dim).to(dtype),
        values=draw(hkv, num_tokens, dim).to(dtype),
        positions=torch.arange(num_tokens),
    )
    obs = Observation(
        layer_idx=1,
        num_layers=4,
        scaling=dim**-0.5,
        budget_tokens=budget,
        rope=Rope(inv_freq=10000.0 ** (-torch.arange(0, dim, 2) / dim)),
        queries=draw(heads, min(window, num_tokens), dim).to(dtype),
        query_mean=draw(heads, dim),
        query_cov=root @ root.mT,
        attention_mass=draw(heads, num_tokens).abs(),
        pre_rope_queries=draw(heads, num_tokens, dim).to(dtype),
        pre_rope_keys=draw(hkv, num_tokens, dim).to(dtype),
        hidden_states=draw(num_tokens, WIDTH).to(dtype),
        replay_mass=draw(hkv, num_tokens).abs(),
        image_mask=draw(num_tokens) > 0,
    )
    return kv, obs


def layer_for(scorer: Scorer, num_tokens: int, **kwargs: object) -> tuple[LayerKV, Observation]:
    """`make_layer` with the query window that the scorer asks for."""
    return make_layer(num_tokens, window=max(scorer.query_window, 1), **kwargs)  # type: ignore[arg-type]


def tensors(bundle: LayerKV | Observation) -> list[Tensor]:
    """The tensors of a bundle."""
    return [v for f in dataclasses.fields(bundle) if isinstance(v := getattr(bundle, f.name), Tensor)]
