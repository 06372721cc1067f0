"""Tokens that go round decoder layers: hooks that take them out before a layer and put them back behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module

from steno.cache.layer import LayerCache
from steno.errors import ModelError, UnsupportedAttention
from steno.models.host import HostMask, is_attention
from steno.types import Route

SEQUENCE_AXIS = {"hidden_states": -2, "position_ids": -1, "position_embeddings": -2}
"""Which axis of an argument of a decoder layer runs along the tokens."""


@contextmanager
def routing(model: Module, layers: list[Any]) -> Iterator[None]:
    """Within it the decoder layers of `model` compute only the tokens that their cache layers ask for.

    Raises ModelError if a layer keeps another cache than ours, whose tokens could not be told apart later.
    """
    pairs: list[tuple[Module, Any]] = [(parent, child) for parent in model.modules() for child in parent.children()]
    found = [(parent, layers[child.layer_idx], child.layer_idx) for parent, child in pairs if is_attention(child)]
    foreign = [str(layer_idx) for _, layer, layer_idx in found if not isinstance(layer, LayerCache)]
    if foreign or not found:
        raise ModelError(
            f"tokens can go round layers only where all are full attention; layers {', '.join(foreign) or 'none'} of "
            f"{type(model).__name__} are not: use a recipe without that stage."
        )
    with ExitStack() as hooks:
        for parent, layer, _ in found:
            bypass = _Bypass(layer)
            for hook in (
                parent.register_forward_pre_hook(bypass.enter, with_kwargs=True),
                parent.register_forward_hook(bypass.leave),
            ):
                hooks.callback(hook.remove)
        yield


class _Bypass:
    """The way round one decoder layer. Mutable: what waits while the layer computes."""

    def __init__(self, layer: LayerCache) -> None:
        self.layer = layer
        self.waiting: tuple[Tensor, Route] | None = None

    def enter(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leaves the tokens of the route in the arguments of the layer."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        route = self.layer.route(hidden)
        if route is None:
            return None
        self.waiting = hidden, route
        named = {name: _taken(name, x, route.index, hidden.shape[1]) for name, x in kwargs.items()}
        first = () if "hidden_states" in kwargs else (hidden.index_select(1, route.index), *args[1:])
        return first, named

    def leave(self, module: Module, args: tuple[Any, ...], out: Any) -> Any:
        """Puts what the layer made of them back among the others, which are as they came."""
        if self.waiting is None:
            return None
        (hidden, route), self.waiting = self.waiting, None
        computed = out if isinstance(out, Tensor) else out[0]
        if route.gates is not None:
            before = hidden.index_select(1, route.index)
            computed = before + route.gates.to(hidden.dtype)[:, None] * (computed - before)
        whole = hidden.index_copy(1, route.index, computed)
        return whole if isinstance(out, Tensor) else (whole, *out[1:])


def _taken(name: str, value: Any, index: Tensor, count: int) -> Any:
    """An argument of a decoder layer for the tokens of `index` alone, out of `count`."""
    if name in SEQUENCE_AXIS and value is not None:
        parts = value if isinstance(value, tuple) else (value,)
        taken = tuple(part.index_select(SEQUENCE_AXIS[name], index) for part in parts)
        return taken if isinstance(value, tuple) else taken[0]
    if isinstance(value, HostMask) and value.counts is not None:
        raise UnsupportedAttention(
            "tokens cannot go round layers in a padded batch; read one sequence without padding."
        )
    if isinstance(value, Tensor) and count in value.shape:
        raise UnsupportedAttention(f"tokens cannot go round a layer that takes the argument {name!r}.")
    return value
