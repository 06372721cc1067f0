"""What a method of each kind must offer. Only signatures: every method is a final class that matches one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

from steno.cache.policy import SegmentEncoder, Store, StoreBytes
from steno.cache.segment import Segment
from steno.cache.transformed import Basis
from steno.types import IndexItems, KeptTokens, LayerKV, Merged, Need, Observation, PageFormat, Route, Widths

if TYPE_CHECKING:
    from steno.cache.access import AccessStep, Choice


class Method(Protocol):
    """What every method says about itself."""

    id: ClassVar[str]
    kind: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    year: ClassVar[int]
    arxiv: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    trained: ClassVar[bool]
    frees_memory: ClassVar[bool]
    differs: ClassVar[str]


class Propagator(Method, Protocol):
    """Which tokens of the prompt a layer computes: a `Router` or an `Attender`."""

    routes_layers: ClassVar[bool]
    """Whether it is a `Router`."""

    @property
    def query_window(self) -> int:
        """How many of the last queries `obs.queries` must hold; 0 without `Need.QUERIES`."""


class Attender(Propagator, Protocol):
    """Which tokens of the prompt take part in the attention of a layer; the others get zeros from it, and are kept."""

    def within(self, kv: LayerKV, queries: Tensor, obs: Observation) -> Tensor | None:
        """The tokens that take part, `[n]` int64 ascending, the last among them; None: all.

        kv and obs: those of the layer; queries: `[H, S, D]`, of the whole prompt, post-RoPE.
        """


class Router(Propagator, Protocol):
    """Which tokens pass a layer; the others go round it on the residual stream and leave no key there."""

    def before(self, hidden: Tensor, image_mask: Tensor | None, *, layer_idx: int, num_layers: int) -> Route | None:
        """The tokens of a pass that a layer computes, from what comes to it, `[T, hidden]`; None: all of them.

        image_mask: `[T]` bool, for those who declare `Need.IMAGE_MASK`.
        """

    def after(self, kv: LayerKV, obs: Observation) -> Tensor | None:
        """The tokens of the prompt that all later layers compute, `[n]` int64 ascending, the last among them; None: no choice.

        Asked after each layer until there is a choice; kv and obs are those of the layer.
        """


class Scorer(Method, Protocol):
    """How much each token matters, higher is kept first; +inf is protected."""

    evicts_while_decoding: ClassVar[bool]

    @property
    def query_window(self) -> int:
        """How many of the last queries `obs.queries` must hold; 0 without `Need.QUERIES`."""

    @property
    def query_statistics_skip(self) -> int:
        """How many first tokens the query statistics leave out."""

    @property
    def min_tokens(self) -> int:
        """How many tokens per KV head are protected whatever their score: the smallest budget that can hold."""

    def score(self, kv: LayerKV, obs: Observation) -> Tensor:
        """Scores `[Hkv, S]` fp32; never NaN; the input is not changed."""


class Evictor(Scorer, Protocol):
    """A scorer that goes on choosing at every decode step, over a state of one number per held token."""

    needs_weights: ClassVar[bool]

    def prefill_state(self, kv: LayerKV, obs: Observation) -> Tensor:
        """The state `[Hkv, S]` fp32 after the prompt."""

    def observe(self, state: Tensor, weights: Tensor, *, step: int) -> Tensor:
        """The next state `[Hkv, n]` from the attention weights `[H, n]` of one step; a new token comes in as 0.

        step: tokens since the end of the prompt, this one included.
        """

    def priority(self, state: Tensor, positions: Tensor, budget_tokens: int) -> Tensor:
        """What to keep first, `[Hkv, n]` fp32, from the state and the true positions, both `[Hkv, n]`."""


class Reader(Scorer, Protocol):
    """A scorer that can evict while a prompt is read chunk by chunk, over a state of one number per token.

    What it needs is shown for each chunk alone. `score` is `retention` of the whole prompt, with `is_last`.
    """

    def token_state(self, kv: LayerKV, obs: Observation) -> Tensor:
        """The state `[Hkv, T]` fp32 of the tokens of a chunk; found once, from these tokens alone."""

    def retention(self, keys: Tensor, state: Tensor, positions: Tensor, *, budget_tokens: int, is_last: bool) -> Tensor:
        """What to keep first, `[Hkv, n]` fp32, of all that is held: keys `[Hkv, n, D]`, state and positions `[Hkv, n]`.

        is_last: whether the prompt ends here.
        """


class Allocator(Method, Protocol):
    """How many tokens each head of a layer keeps."""

    across_layers: ClassVar[bool]
    """Whether it is shown the scores of all layers at once, as of one layer with L * Hkv heads; all stay dense until then."""

    by_layer: ClassVar[bool]
    """Whether it gives layers numbers of their own, whatever the finite scores, which together may be up to (L - 1) / 2 tokens
    a layer above the budget."""

    by_head: ClassVar[bool]
    """Whether all that it does is to give heads of a layer unlike numbers, each layer its whole budget."""

    def allocate(self, scores: Tensor, *, budget_tokens: int, layer_idx: int, num_layers: int) -> Tensor:
        """Counts `[Hkv]` int64 from scores `[Hkv, S]`; `budget_tokens` is the mean over heads and layers.

        Where it gives layers different budgets (`by_layer`), S is that of the whole prompt in every layer, and tokens that
        went round this one come last, with -inf.
        """


class Merger(Method, Protocol):
    """What becomes of the tokens that are not kept."""

    counts_tokens: ClassVar[bool]
    """Whether entries may stand for several tokens: `Merged.counts` may be given."""

    def merge(self, kv: LayerKV, kept: Tensor, scores: Tensor, obs: Observation) -> Merged:
        """The layer in which the entries of `kept` `[Hkv, S]` bool stand for all; the others are not read again.

        scores: `[Hkv, S]` fp32, those that chose `kept`. The answer keeps at most as many entries of each head, and at
        least one; it may keep others in their place.
        """


class Transform(Method, Protocol):
    """A change of basis between the choice of tokens and how they are stored, with its query side."""

    heads_together: ClassVar[bool]
    """Whether a basis runs across KV heads, so that all heads must keep the same tokens."""

    keeps_spans: ClassVar[bool]
    """Whether the kernels can read what it leaves, so that a step may read a part: keys and values of one width, and queries
    that are the same for all tokens."""

    @property
    def query_window(self) -> int:
        """How many of the last queries `tokens.observation.queries` must hold; 0 without `Need.QUERIES`."""

    @property
    def first_tokens(self) -> int:
        """The first tokens of a prompt, those at positions below this, stay plain where all heads keep them."""

    @property
    def recent_tokens(self) -> int:
        """So many newest tokens at least stay plain."""

    @property
    def residual_tokens(self) -> int:
        """Without a quantize stage the tail changes its basis when it holds this many tokens (beside the recent ones)."""

    def stored(self, widths: Widths) -> Widths:
        """What a token of these widths is in the basis."""

    def basis_bytes(self, widths: Widths, num_layers: int, number_bytes: int) -> int:
        """The most bytes that the basis of one layer takes for tokens of these widths, in numbers of so many bytes; its part
        of what is the same in all layers."""

    def fit(self, tokens: KeptTokens) -> Basis:
        """The basis for what one sequence keeps of its prompt in one layer; the same object where it is the same for all.

        `tokens.observation` is that of the prompt; the input is not changed.
        """


class Sharer(Method, Protocol):
    """Segments of neighbouring layers out of common tensors. All their heads keep the same tokens."""

    def group(self, layer_idx: int, num_layers: int) -> range:
        """The neighbouring layers that share, with `layer_idx` among them; itself alone if it shares nothing."""

    def stored(self, widths: Widths, num_sharing: int) -> Widths:
        """What is stored once for so many layers, of tokens of these widths."""

    def fixed_bytes(self, widths: Widths, num_layers: int, number_bytes: int) -> int:
        """What one layer takes at most beside its tokens, each of which takes no more than it would by itself."""

    def shared_bytes(self, num_tokens: int, widths: Widths, num_sharing: int, store: StoreBytes) -> int:
        """The most that one of the layers that share takes for so many tokens, with its part of what is common."""

    def share(self, layers: Sequence[KeptTokens], store: Store) -> list[Segment]:
        """A segment for each layer of a group; see `steno.cache.policy.Sharer`. The input is not changed."""


class Quantizer(Method, Protocol):
    """How tokens are stored, and when the tail is: in pages of a format, or, without one, as an `Encoder`."""

    @property
    def page_format(self) -> PageFormat | None:
        """How a page stores its tokens; None: the method is an `Encoder`."""

    @property
    def residual_tokens(self) -> int:
        """The tail is stored when it holds this many tokens; a multiple of the page, or of an encoder's chunk."""


class Encoder(Quantizer, SegmentEncoder, Protocol):
    """A quantizer without a page format; see `SegmentEncoder`."""


class Access(Method, Protocol):
    """What a decode step of one token per row reads of the segments; the tail is always read, and several tokens read all."""

    reads_all: ClassVar[bool]
    """Whether every step of every layer reads everything; nothing below is asked then."""
    summarizes: ClassVar[bool]
    """Whether the cache keeps an index of the segments, made by `summarize`."""

    @property
    def offload(self) -> bool:
        """Whether the segments of layers that read only a part lie in a file instead of in memory."""

    def reads_layer(self, layer_idx: int, num_layers: int) -> bool:
        """Whether a layer reads everything, and has nothing to tell others."""

    def fix(self, keys: Sequence[Tensor], layer_idx: int, num_layers: int) -> Tensor | None:
        """What is fixed once for each head when the prompt of a row is complete: `[Hkv, F]` from its keys `[n_h, D]`, or None."""

    def summarize(self, keys: Tensor, fixed: Tensor | None, sentences: Tensor | None) -> IndexItems:
        """What the index holds of keys `[n, D]` of one head of one segment, n >= 0; pages begin anew with every segment.

        fixed: `[F]`, of the head. sentences: `[n]`, to which sentence each token belongs; given with `Need.TOKEN_TEXT`.
        """

    def choose(self, step: AccessStep) -> Choice | None:
        """What this step reads of the segments; None: everything."""

    def index_bytes(self, head_dim: int, number_bytes: int) -> tuple[int, int]:
        """The most bytes of what is held beside the tokens of one head: for each token, and once."""
