"""One model's memory for B sequences: what transformers sees as `past_key_values`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, get_layer_types_and_kwargs

from steno.cache.accounting import Meter, held_bytes, offloaded_bytes
from steno.cache.layer import LayerCache
from steno.cache.prompt import ReplayObserver
from steno.cache.reading import Reading
from steno.cache.text import TokenText
from steno.errors import BadArgument, ModelError
from steno.models.host import NAME, is_attention
from steno.models.images import image_tokens, takes_images
from steno.models.learned import find_weights, known_file
from steno.models.rope import rope_of
from steno.models.routing import routing
from steno.pipeline import RecipePolicy, with_weights
from steno.recipe import Recipe, as_recipe
from steno.types import Need


class KVCache(Cache):
    """A cache whose full-attention layers follow a recipe; other layers keep transformers' own class.

    Parameters
    ----------
    config : PreTrainedConfig
        The configuration of the model, of the whole of it where it sees images; its attention implementation must be `steno`
        (`model.set_attn_implementation("steno")`).
    recipe : Recipe, str or None
        What to keep and how; None keeps everything, dense.
    prompt_tokens : int or None
        Length at which the prompt is complete and gets compressed. None: after the first forward pass; give it when the
        prompt comes in chunks (`prefill_chunk_size`), since transformers does not say which chunk is the last.
    evict_while_reading : bool
        Whether the method evicts after every chunk of such a prompt, so that no layer ever holds more than the budget and
        one chunk; needs `prompt_tokens`, and a method of `steno.methods.READERS`.
    model_hash : str or None
        `steno.models.identity.model_hash` of the model, under which methods find what they learned of it; None: such
        methods must name their file.
    sentence_ends : frozenset of int or None
        Token ids that end a sentence (`steno.decode.text.sentence_ends`), for recipes that must know; then every forward
        pass must be announced.
    input_ids : Tensor or None
        The prompt, `[B, T]`, for recipes that look at which of its tokens are image tokens; of a model that takes no images
        none is, and nothing need be given.

    Raises
    ------
    RecipeError
        If the recipe cannot be parsed, or cannot evict while it reads and should.
    ModelError
        If the model keeps no key-value cache in any layer, or the recipe looks at images and the configuration does not
        name their tokens.
    CalibrationError
        If a method has learned nothing of the model yet.
    """

    def __init__(
        self,
        config: Any,
        recipe: Recipe | str | None = None,
        *,
        prompt_tokens: int | None = None,
        evict_while_reading: bool = False,
        model_hash: str | None = None,
        sentence_ends: frozenset[int] | None = None,
        input_ids: Tensor | None = None,
    ) -> None:
        if prompt_tokens is not None and prompt_tokens < 1:
            raise BadArgument(f"`prompt_tokens` must be >= 1; got prompt_tokens={prompt_tokens}.")
        self.recipe = as_recipe(recipe)
        self.model_hash = model_hash
        if evict_while_reading:
            self.recipe.check_evicts_while_reading()
            if prompt_tokens is None:
                raise BadArgument("`evict_while_reading` needs `prompt_tokens`, the length of the whole prompt.")
        image_mask, has_images = None, takes_images(config)
        if has_images and input_ids is not None and Need.IMAGE_MASK in self.recipe.needs:
            image_mask = image_tokens(config, input_ids)
        self.reading = Reading(
            prompt_tokens=prompt_tokens, evict=evict_while_reading, has_images=has_images, image_mask=image_mask
        )
        if sentence_ends is not None and Need.TOKEN_TEXT in self.recipe.needs:
            self.reading.shared.text = TokenText(sentence_ends)
        self.meter = Meter()
        self.config = config.get_text_config(decoder=True)
        super().__init__(layers=self._build_layers())

    def _build_layers(self) -> list[Any]:
        layer_types, layer_kwargs = get_layer_types_and_kwargs(self.config)
        shared = bool(getattr(self.config, "num_kv_shared_layers", 0))
        modes = getattr(self.config, "kv_sharing_modes", None) or [None] * len(layer_types)
        ours = [
            kind == "full_attention" and mode is None and (not shared or any(modes))
            for kind, mode in zip(layer_types, modes, strict=True)
        ]
        learned = with_weights(
            self.recipe,
            lambda method, command: find_weights(method, self.model_hash, command),
            lambda method: known_file(method, self.model_hash),
        )
        policy, layers = RecipePolicy(learned), []
        for kind, kwargs, is_ours in zip(layer_types, layer_kwargs, ours, strict=True):
            if not is_ours:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs))
                continue
            layers.append(
                LayerCache(
                    policy,
                    layer_idx=sum(isinstance(layer, LayerCache) for layer in layers),
                    num_layers=sum(ours),
                    reading=self.reading,
                    meter=self.meter,
                    rope_of=partial(rope_of, self.config, kind),
                )
            )
        _join_groups([layer for layer in layers if isinstance(layer, LayerCache)])
        return layers

    def __repr__(self) -> str:
        return f"KVCache(recipe={str(self.recipe)!r}, layers={len(self.layers)}, tokens={self.seen_tokens})"

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Hands new keys and values to a layer; a layer of ours returns itself for the attention function."""
        if self.config._attn_implementation != NAME and isinstance(self.layers[layer_idx], LayerCache):
            raise ModelError(
                f"steno's cache needs steno's attention; the model uses {self.config._attn_implementation!r}: "
                'call model.set_attn_implementation("steno").'
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def own_layers(self) -> list[LayerCache]:
        """The layers that follow the recipe."""
        return [layer for layer in self.layers if isinstance(layer, LayerCache)]

    @property
    def seen_tokens(self) -> int:
        """The logical length: tokens seen, padding included."""
        return self.get_seq_length()

    def fork(self) -> KVCache:
        """A cache that shares everything held and goes its own way; costs the copy of the tails."""
        twin = KVCache(
            self.config,
            self.recipe,
            prompt_tokens=self.reading.prompt_tokens,
            evict_while_reading=self.reading.evict,
            model_hash=self.model_hash,
        )
        twin.reading.shared = self.reading.shared.fork()
        twin.reading.has_images, twin.reading.image_mask = self.reading.has_images, self.reading.image_mask
        twin.layers = [
            layer.fork(twin.reading, twin.meter) if isinstance(layer, LayerCache) else copy.deepcopy(layer)
            for layer in self.layers
        ]
        _join_groups(twin.own_layers)
        return twin

    @contextmanager
    def replaying(self, observer: ReplayObserver) -> Iterator[None]:
        """Within it a forward pass is attended and observed, and leaves the cache as it was."""
        others = {i: copy.deepcopy(x) for i, x in enumerate(self.layers) if not isinstance(x, LayerCache)}
        self.reading.replay = observer
        try:
            yield
        finally:
            self.reading.replay = None
            for i, layer in others.items():
                self.layers[i] = layer

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Within it a prompt is read for recipes that look at hidden states or let tokens go round layers.

        Hooks on the attention modules and decoder layers of `model` that stand only meanwhile; none are set where the recipe
        needs none. Raises ModelError if tokens should go round layers and not all of them are ours.
        """
        with ExitStack() as hooks:
            if self.recipe.propagate is not None and self.recipe.propagate.routes_layers:
                hooks.callback(self.reading.unwatch)
                hooks.enter_context(routing(model, self.layers))
                self.reading.is_watched = True
            for module in model.modules():
                layer = self.layers[module.layer_idx] if is_attention(module) else None
                if isinstance(layer, LayerCache) and Need.HIDDEN_STATES in layer.policy.needs:
                    hook = module.register_forward_pre_hook(partial(_show_hidden, layer), with_kwargs=True)
                    hooks.callback(hook.remove)
            yield

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest tokens of every layer, or of none; as in transformers, the count is negative."""
        if tokens_to_remove < 0 and self.seen_tokens:
            for layer in self.own_layers:
                layer.check_crop(-tokens_to_remove)
        for layer in sorted(self.layers, key=lambda layer: isinstance(layer, LayerCache)):  # ours were checked
            layer.crop(tokens_to_remove)
        if self.reading.shared.text is not None:
            self.reading.shared.text.crop(-tokens_to_remove)

    def announce(self, rows: Sequence[Sequence[int]]) -> None:
        """Tells the cache the tokens of the next forward pass, row by row and without padding, where its recipe asks for them."""
        if self.reading.shared.text is not None:
            self.reading.shared.text.announce(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_text(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        text = self.reading.shared.text
        self._select_text([b for b in range(len(text.rows) if text else 0) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_text((indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices).tolist())

    def _select_text(self, rows: list[int]) -> None:
        if self.reading.shared.text is not None:
            self.reading.shared.text.select(rows)

    def compress(self, replay_mass: list[Tensor] | None = None) -> None:
        """Ends the reading of the prompt now, layer by layer. replay_mass: `[Hkv, S]` per layer, for methods that replay."""
        for i, layer in enumerate(self.own_layers):
            if layer.content is None and layer.row_seen:
                layer.compress(replay_mass[i] if replay_mass is not None else None)

    # accounting

    @property
    def kv_bytes(self) -> int:
        """Bytes held now: distinct storages of every tensor reachable from the cache."""
        for layer in self.own_layers:
            layer.measure()
        return held_bytes(list(self.layers))

    @property
    def kv_bytes_offloaded(self) -> int:
        """Bytes that lie in files instead of in memory; no part of `kv_bytes`."""
        return offloaded_bytes(list(self.layers))

    @property
    def kv_bytes_peak(self) -> int:
        """The most bytes that the layers under the recipe ever held, the dense layer in work included, and the others hold."""
        held = self.kv_bytes  # brings the meter up to date
        return held - self.meter.held_bytes + self.meter.peak_bytes

    @property
    def kv_bytes_full(self) -> int:
        """What a dense cache of the same tokens would hold in the model's dtype, padding excluded."""
        total = 0
        for layer in self.own_layers:
            total += sum(layer.row_seen) * layer.token_bytes
        return total + held_bytes([layer for layer in self.layers if not isinstance(layer, LayerCache)])

    def held_tokens(self) -> list[list[list[int]]]:
        """Held tokens `[L][B][Hkv]` of the layers under the recipe."""
        return [layer.held_tokens() for layer in self.own_layers]

    def check_integrity(self) -> None:
        """Raises IntegrityError if an invariant of any layer does not hold."""
        for layer in self.own_layers:
            layer.check_integrity()


def _join_groups(layers: list[LayerCache]) -> None:
    """Tells every layer which of its neighbours it is compressed with."""
    for i, layer in enumerate(layers):
        members = layer.policy.group(i, len(layers))
        layer.group = [layers[m] for m in members]


def _show_hidden(layer: LayerCache, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of an attention module."""
    layer.show_hidden(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
