"""What every layer sees of some tokens: the host's own observations, without a recipe that drops anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch

from steno.cache.policy import Allocation, Selection
from steno.models.kvcache import KVCache
from steno.session import LanguageModel
from steno.types import LayerKV, Need, Observation


@final
@dataclass(frozen=True, kw_only=True)
class Look:
    """A policy that keeps everything and looks at what it is asked to."""

    needs: frozenset[Need]
    query_window: int = 2**31 - 1
    query_statistics_skip: int = 0
    page_format: ClassVar[None] = None
    encoder: ClassVar[None] = None
    transforms: ClassVar[tuple[()]] = ()
    sharer: ClassVar[None] = None
    residual_tokens: ClassVar[int] = 64
    evictor: ClassVar[None] = None
    reader: ClassVar[None] = None
    selector: ClassVar[None] = None
    router: ClassVar[None] = None
    attender: ClassVar[None] = None

    def check_widths(self, num_kv_heads: int, head_dim: int, num_sharing: int) -> None:
        """All is stored as it is."""

    def budget_tokens(self, kv: LayerKV, num_layers: int, prompt_tokens: int | None = None) -> int:
        return kv.num_tokens

    def group(self, layer_idx: int, num_layers: int) -> range:
        return range(layer_idx, layer_idx + 1)

    def select_together(self, kvs: Sequence[LayerKV], observations: Sequence[Observation]) -> list[Selection]:
        return [Selection(kv=kv) for kv in kvs]

    def select(self, kv: LayerKV, observation: Observation, allocation: Allocation | None = None) -> Selection:
        return Selection(kv=kv)

    def allocate_across(
        self, kvs: Sequence[LayerKV], observations: Sequence[Observation]
    ) -> Sequence[Allocation | None]:
        return [None] * len(kvs)


def look(lm: LanguageModel, tokens: Sequence[int], *needs: Need, **options: Any) -> list[tuple[LayerKV, Observation]]:
    """Keys, values and what was observed of `tokens`, read in one pass, for each layer that keeps keys under a recipe."""
    cache = KVCache(lm.model.config, prompt_tokens=len(tokens) + 1)  # never complete: it stays as it was read
    policy = Look(needs=frozenset(needs), **options)
    for layer in cache.own_layers:
        layer.policy = policy
    inputs = torch.tensor([list(tokens)], dtype=torch.long, device=lm.model.device)
    with torch.no_grad(), cache.watching(lm.model):  # no inference mode: what is seen may be trained on
        lm.model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [layer.observation() for layer in cache.own_layers]
