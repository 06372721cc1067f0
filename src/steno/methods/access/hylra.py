"""HyLRA: layers whose attention spreads read everything; of the others only some choose tokens, the rest reuse their choice.

Source: Ai, Yang, Wang, Deng, Zhang, Chen, Zhang, 2026, https://arxiv.org/abs/2602.00777 (abstract); the tool RALS in
    ModelEngine-Group/unified-cache-management, taken to be its offline part (an inference, not a statement of the authors).
Differs: the abstract is all of the paper that was at hand, and every step follows the tool, so this is a reconstruction. The
    dynamic programme runs over the layers between those that read everything, so that no source is kept at the price of one
    of them. Chunks are pages of 64 tokens; where heads hold different tokens a choice is handed on by true positions. A
    layer that chooses reads all keys at full precision, the product compares 128-bit hashes.
Cost: per layer that chooses, the weights of all tokens, 2*H*S*D FLOPs on keys that are opened tile by tile; 4 bytes per token and
    KV head held beside the tokens where some were dropped. Saves reads, not memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.cache.access import AccessStep, Choice
from steno.cache.ragged import best, with_ends
from steno.calibration import load_calibration
from steno.errors import CalibrationError
from steno.methods.checks import require_int, require_text
from steno.types import PAGE_TOKENS, IndexItems, Need

SOURCE = "source_layer"
"""The tensor of a weights file, `[L]`: -1 where a layer reads everything, its own number where it chooses, otherwise that of
the layer whose choice it reuses."""
MASS = 0.9
SPARSITY, CHANGES = 0.91, 0.3


@final
@dataclass(frozen=True, kw_only=True)
class HyLRA:
    """Read the pages that got the most attention in this layer or in the one whose choice it reuses.

    Parameters
    ----------
    tokens : int, default 2048 tokens
        How much each KV head reads per step, in whole pages, sinks and window included.
    sinks : int, default 64 tokens
        First tokens, read in any case.
    recent : int, default 512 tokens
        Newest tokens, read in any case.
    weights : str or None, default None
        A file of `steno calibrate hylra` with `source_layer` `[L]`, which says what each layer does (`plan_layers`). None: the
        one for this model.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    CalibrationError
        When the prompt is complete, if there is no such file or it cannot be used.
    """

    id: ClassVar[str] = "hylra"
    kind: ClassVar[str] = "access"
    title: ClassVar[str] = "HyLRA (reconstruction)"
    paper: ClassVar[str] = "HyLRA: Hybrid Layer Reuse Attention for Efficient Long-Context Inference"
    year: ClassVar[int] = 2026
    arxiv: ClassVar[str] = "2602.00777"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = False
    differs: ClassVar[str] = (
        "A reconstruction from the abstract and a tool of the same organisation; the dynamic programme runs over the layers "
        "that do not read everything; chunks are pages of 64 tokens."
    )
    reads_all: ClassVar[bool] = False
    summarizes: ClassVar[bool] = False
    offload: ClassVar[bool] = False

    tokens: int = 2048
    sinks: int = 64
    recent: int = 512
    weights: str | None = None

    def __post_init__(self) -> None:
        require_int("tokens", self.tokens, 1)
        require_int("sinks", self.sinks, 0)
        require_int("recent", self.recent, 0)
        if self.weights is not None:
            require_text("weights", self.weights)

    def source(self, layer_idx: int, num_layers: int) -> int:
        """Whose choice a layer reads, its own included; -1: it reads everything."""
        if self.weights is None:
            raise CalibrationError(
                "hylra must know what each layer does: run `steno calibrate hylra --model M` once and name its file, "
                "hylra(weights='FILE'), or read with steno.load(...).read(...), which finds it."
            )
        return _sources(load_calibration(self.weights, (SOURCE,)), num_layers)[layer_idx]

    def reads_layer(self, layer_idx: int, num_layers: int) -> bool:
        return self.source(layer_idx, num_layers) < 0

    def fix(self, keys: Sequence[Tensor], layer_idx: int, num_layers: int) -> None:
        return None

    def summarize(self, keys: Tensor, fixed: Tensor | None, sentences: Tensor | None) -> IndexItems:
        """Nothing: `[0, 0]`."""
        return IndexItems(vectors=keys[:0, :0])

    def choose(self, step: AccessStep) -> Choice:
        """The pages with the most attention of all query heads of a KV head, here or in the source."""
        source = self.source(step.layer_idx, step.num_layers)
        if source == step.layer_idx:
            found = step.weights()
            step.share(found.segments.sum(1), found.tail.sum(1), between_heads=False)
        in_tail = -(-step.tail_tokens // PAGE_TOKENS)  # pages, [R]
        newest = (-(-(self.recent - step.tail_tokens) // PAGE_TOKENS)).clamp(min=0)
        first = -(-self.sinks // PAGE_TOKENS)
        scores = with_ends(step.page_sums(source), step.head_pages, first=first, last=newest)
        return Choice(pages=best(scores, torch.maximum(max(1, self.tokens // PAGE_TOKENS) - in_tail, newest + first)))

    def index_bytes(self, head_dim: int, number_bytes: int) -> tuple[int, int]:
        return 4, 0


def _sources(tensors: Mapping[str, Tensor], num_layers: int) -> list[int]:
    """What each layer does, if it fits the model and makes sense."""
    sources = [int(x) for x in tensors[SOURCE].flatten().tolist()]
    if len(sources) != num_layers:
        raise CalibrationError(
            f"{SOURCE} must have one entry per layer of this model, {num_layers}; got {len(sources)}: name a file of this model."
        )
    for layer, source in enumerate(sources):
        if not -1 <= source <= layer or (source >= 0 and sources[source] != source):
            raise CalibrationError(
                f"{SOURCE} must name for layer {layer} a layer up to it that chooses, or -1; got {source}: mend the file."
            )
    return sources


# calibration: what each layer does


def mass_ratio(chunks: Tensor) -> Tensor:
    """How large a share of the chunks holds 90% of the mass: chunks `[..., C]` of mass to `[...]`."""
    ordered = chunks.sort(dim=-1, descending=True).values
    needed = (ordered.cumsum(-1) < MASS * ordered.sum(-1, keepdim=True)).sum(-1) + 1
    return needed.clamp(max=chunks.shape[-1]) / chunks.shape[-1]


def robust_mean(x: Tensor) -> Tensor:
    """The mean over the last axis after values beyond 1.5 interquartile ranges are cut back to there."""
    low, high = x.quantile(0.25, dim=-1, keepdim=True), x.quantile(0.75, dim=-1, keepdim=True)
    reach = 1.5 * (high - low)
    return x.clamp(low - reach, high + reach).mean(-1)


def plan_layers(ratios: Tensor, overlap: Tensor, *, sparsity: float = SPARSITY, changes: float = CHANGES) -> list[int]:
    """What each layer does, as in a weights file.

    Parameters
    ----------
    ratios: `[L]`, how widely a layer's attention spreads; the ceil(L * (1 - sparsity)) widest read everything.
    overlap: `[L, L]`, at [i, j] the share of layer j's choice that layer i < j makes too.
    changes: the other layers may change their source so often, as a share of their number, rounded up.
    """
    num_layers = len(ratios)
    num_full = min(num_layers, math.ceil(round(num_layers * (1 - sparsity), 9)))
    full = set(ratios.argsort(descending=True, stable=True)[:num_full].tolist())
    rest = [layer for layer in range(num_layers) if layer not in full]
    plan = [-1] * num_layers
    if rest:
        table = overlap[rest][:, rest].tolist()
        for layer, source in zip(rest, best_sources(table, 1 + math.ceil(round(len(rest) * changes, 9))), strict=True):
            plan[layer] = rest[source]
    return plan


def best_sources(overlap: Sequence[Sequence[float]], max_sources: int) -> list[int]:
    """A source for each layer, itself or the one before keeps, so that the least overlap is largest, then their sum.

    The least is optimal; the sum is the best that a search from layer to layer finds.
    """
    states: dict[tuple[int, int], tuple[float, float, list[int]]] = {
        (0, 1): (1.0, 1.0, [0])
    }  # (source, sources so far)
    for layer in range(1, len(overlap)):
        following: dict[tuple[int, int], tuple[float, float, list[int]]] = {}
        for (source, used), (least, total, path) in states.items():
            moves = [(source, used, overlap[source][layer])]
            if used < max_sources:
                moves.append((layer, used + 1, 1.0))
            for chosen, count, share in moves:
                value = (min(least, share), total + share, [*path, chosen])
                if (chosen, count) not in following or value[:2] > following[chosen, count][:2]:
                    following[chosen, count] = value
        states = following
    return max(states.values(), key=lambda value: value[:2])[2]
