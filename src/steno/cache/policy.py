"""What a recipe asks of one layer, as the cache sees it: which tokens stay, in which format, and who evicts later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from steno.types import IndexItems, KeptTokens, LayerKV, Need, Observation, PageFormat, Route, Widths

if TYPE_CHECKING:
    from steno.cache.access import AccessStep, Choice
    from steno.cache.segment import Segment
    from steno.cache.transformed import Basis


class Evictor(Protocol):
    """A score method that goes on evicting while the model decodes."""

    @property
    def needs_weights(self) -> bool: ...

    def observe(self, state: Tensor, weights: Tensor, *, step: int) -> Tensor: ...

    def priority(self, state: Tensor, positions: Tensor, budget_tokens: int) -> Tensor: ...


class Reader(Protocol):
    """A score method that evicts while the prompt is read."""

    def token_state(self, kv: LayerKV, obs: Observation) -> Tensor: ...

    def retention(
        self, keys: Tensor, state: Tensor, positions: Tensor, *, budget_tokens: int, is_last: bool
    ) -> Tensor: ...


class Attender(Protocol):
    """A method that lets some tokens of the prompt take part in attention."""

    def within(self, kv: LayerKV, queries: Tensor, obs: Observation) -> Tensor | None: ...


class Router(Protocol):
    """A method that lets tokens of the prompt go round layers."""

    def before(self, hidden: Tensor, image_mask: Tensor | None, *, layer_idx: int, num_layers: int) -> Route | None: ...

    def after(self, kv: LayerKV, obs: Observation) -> Tensor | None: ...


class Selector(Protocol):
    """An access method that reads only a part in a decode step; `methods/interfaces.py` says what each function is."""

    @property
    def needs(self) -> frozenset[Need]: ...

    @property
    def summarizes(self) -> bool: ...

    @property
    def offload(self) -> bool: ...

    def reads_layer(self, layer_idx: int, num_layers: int) -> bool: ...

    def fix(self, keys: Sequence[Tensor], layer_idx: int, num_layers: int) -> Tensor | None: ...

    def summarize(self, keys: Tensor, fixed: Tensor | None, sentences: Tensor | None) -> IndexItems: ...

    def choose(self, step: AccessStep) -> Choice | None: ...


class SegmentEncoder(Protocol):
    """A quantize method without a page format: it makes its own segments."""

    @property
    def chunk_tokens(self) -> int:
        """Lengths that `encode` takes are multiples of this; what is left of a prompt stays dense."""
        ...

    def encode(self, tokens: KeptTokens) -> Segment:
        """A segment of these tokens, which share no memory with it; each token is encoded once."""
        ...

    def bytes_bound(self, num_tokens: int, *, num_kv_heads: int, head_dim: int) -> int | None:
        """The most bytes that `num_tokens` per KV head, on average, can take in one segment; None if there is no bound."""
        ...


class Transform(Protocol):
    """A method that fits a basis to what is kept of a prompt."""

    @property
    def first_tokens(self) -> int:
        """The first tokens of a prompt, those at positions below this, stay plain where all heads keep them."""
        ...

    @property
    def recent_tokens(self) -> int:
        """So many newest tokens at least stay plain."""
        ...

    def fit(self, tokens: KeptTokens) -> Basis: ...


class Store(Protocol):
    """What makes segments of tensors in the form of tokens, as the stages after a sharer ask."""

    @property
    def chunk_tokens(self) -> int:
        """Lengths that `store` takes are multiples of this."""
        ...

    def store(self, tokens: KeptTokens) -> Segment: ...


class StoreBytes(Protocol):
    """What a `Store` needs for what it stores. number_bytes: of a number of the model's dtype."""

    @property
    def number_bytes(self) -> int: ...

    @property
    def chunk_tokens(self) -> int: ...

    def stored_bytes(self, num_tokens: int, widths: Widths) -> int:
        """The most bytes of so many tokens per head, on average."""
        ...


class Sharer(Protocol):
    """A method that makes segments of neighbouring layers out of common tensors."""

    def share(self, layers: Sequence[KeptTokens], store: Store) -> list[Segment]:
        """A segment for each layer of a group, whose tokens are at the same positions in all layers and heads; their number
        is a multiple of what `store` takes."""
        ...


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which tokens of the prompt stay.

    kv: the prompt, after merging. kept: per KV head the indices, ascending; None if all stay.
    state: per KV head the evictor's state of the kept tokens. log_counts: per KV head what is added to the logits of the
    kept tokens, `[n_h]` fp32; None if every entry is one token.
    """

    kv: LayerKV
    kept: list[Tensor] | None = None
    state: list[Tensor] | None = None
    log_counts: list[Tensor] | None = None

    def holds_all(self, prompt_tokens: int) -> bool:
        """Whether every token of the prompt stays: none went round the layer, and none is dropped."""
        return self.kept is None and self.kv.num_tokens == prompt_tokens


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What the heads of a layer may keep, found together with those of other layers.

    scores: `[Hkv, S]` fp32, those of the layer; counts: tokens of each head.
    """

    scores: Tensor
    counts: list[int]


class LayerPolicy(Protocol):
    """Built from a recipe; shared by all layers; holds no state."""

    @property
    def needs(self) -> frozenset[Need]: ...

    @property
    def query_window(self) -> int: ...

    @property
    def query_statistics_skip(self) -> int: ...

    @property
    def page_format(self) -> PageFormat | None: ...

    @property
    def encoder(self) -> SegmentEncoder | None:
        """What makes segments where there is no page format; None for dense ones."""
        ...

    @property
    def transforms(self) -> Sequence[Transform]:
        """The changes of basis before tokens are stored, the first applied first."""
        ...

    @property
    def sharer(self) -> Sharer | None: ...

    def group(self, layer_idx: int, num_layers: int) -> range:
        """The neighbouring layers that are compressed together with a layer; itself alone without a sharer."""
        ...

    @property
    def residual_tokens(self) -> int: ...

    @property
    def evictor(self) -> Evictor | None: ...

    @property
    def reader(self) -> Reader | None: ...

    @property
    def selector(self) -> Selector | None: ...

    @property
    def router(self) -> Router | None:
        """What lets tokens go round layers while the prompt is read; None: all tokens pass all layers."""
        ...

    @property
    def attender(self) -> Attender | None:
        """What lets some tokens take part in attention while the prompt is read; None: all do."""
        ...

    def check_widths(self, num_kv_heads: int, head_dim: int, num_sharing: int) -> None:
        """Raises RecipeError if layers of this shape cannot be stored. num_sharing: layers compressed together."""
        ...

    def budget_tokens(self, kv: LayerKV, num_layers: int, prompt_tokens: int | None = None) -> int:
        """Tokens per KV head on average that this sequence may keep.

        prompt_tokens: of the whole prompt, where some went round the layer; None: those of `kv`.
        """
        ...

    def select(self, kv: LayerKV, observation: Observation, allocation: Allocation | None = None) -> Selection:
        """Which tokens of a layer stay. allocation: what was found for it by `allocate_across`."""
        ...

    def allocate_across(
        self, kvs: Sequence[LayerKV], observations: Sequence[Observation]
    ) -> Sequence[Allocation | None]:
        """What each layer of a group may keep of one sequence, found from all their scores; None: everything."""
        ...

    def select_together(self, kvs: Sequence[LayerKV], observations: Sequence[Observation]) -> list[Selection]:
        """Which tokens stay in the layers of a group and their heads: the same in all."""
        ...
