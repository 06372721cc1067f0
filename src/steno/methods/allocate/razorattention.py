"""RazorAttention: the few heads that look far back keep everything, all others share what is left of the budget.

Source: Tang, Lin, Lin, Han, Ke, Hong, Yao, Wang, 2024, https://arxiv.org/abs/2407.15891; the search for heads follows
    Huawei's MindSpore Golden-Stick, with the union of both sets of heads that its early return misses.
Differs: the buffer of the other heads follows from the recipe's budget instead of max(4000, N/5); where the budget does
    not hold all retrieval heads, those of lower rank become ordinary ones. The allocation only, for any scorer:
    `streaming_llm` makes sinks and buffer as in the paper, but then retrieval heads too stay at the prompt's length
    while decoding. The compensation token is a merge stage. Not for ALiBi.
Cost: one sort of L*Hkv scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.calibration import load_calibration
from steno.errors import CalibrationError
from steno.methods.checks import require_real, require_text
from steno.types import Need

TENSORS = ("induction", "echo")
"""Tensors of a heads file, `[L, Hkv]` each: how much a head looks at the token after the same one, and at the same one."""


@final
@dataclass(frozen=True, kw_only=True)
class RazorAttention:
    """Everything for retrieval heads, equal shares of the rest for the others.

    Parameters
    ----------
    induction : float, default 0.14 of the KV heads
        Share of the heads of the model that are taken by their induction score.
    echo : float, default 0.01 of the KV heads
        Share that is taken by their echo score; a head may be in both.
    weights : str or None, default None
        A file of `steno calibrate razorattention`; None: the one that was made for the model.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    CalibrationError
        When allocating, if the file of `weights` cannot be used.
    """

    id: ClassVar[str] = "razorattention"
    kind: ClassVar[str] = "allocate"
    title: ClassVar[str] = "RazorAttention"
    paper: ClassVar[str] = "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2407.15891"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    across_layers: ClassVar[bool] = False
    by_layer: ClassVar[bool] = True
    by_head: ClassVar[bool] = False
    differs: ClassVar[str] = (
        "The allocation only, for any scorer; the buffer follows from the budget instead of max(4000, N/5), and where the "
        "budget does not hold all retrieval heads, fewer are."
    )

    induction: float = 0.14
    echo: float = 0.01
    weights: str | None = None

    def __post_init__(self) -> None:
        require_real("induction", self.induction, 0, 1)
        require_real("echo", self.echo, 0, 1)
        if self.weights is not None:
            require_text("weights", self.weights)

    def allocate(self, scores: Tensor, *, budget_tokens: int, layer_idx: int, num_layers: int) -> Tensor:
        """Counts `[Hkv]` int64 from scores `[Hkv, S]`; the mean over heads and layers is the budget."""
        assert self.weights is not None, "the cache names the weights of the model"
        num_heads, num_tokens = scores.shape
        found = load_calibration(self.weights, TENSORS)
        if any(list(found[name].shape) != [num_layers, num_heads] for name in TENSORS):
            got = ", ".join(f"{name} {list(found[name].shape)}" for name in TENSORS)
            raise CalibrationError(
                f"the heads must be those of this model, [{num_layers}, {num_heads}]; got {got}: calibrate on this model."
            )
        protected = max(1, int(torch.isposinf(scores).sum(-1).amax()))
        ranked = self.retrieval_heads(found["induction"], found["echo"])
        counts = head_counts(ranked, num_layers * num_heads, num_tokens, budget_tokens, protected)
        mine = counts[layer_idx * num_heads : (layer_idx + 1) * num_heads]
        return torch.tensor(mine, dtype=torch.int64, device=scores.device)

    def retrieval_heads(self, induction: Tensor, echo: Tensor) -> list[int]:
        """The retrieval heads of the model, as layer * Hkv + head, the surest first; `[L, Hkv]` each."""
        ranks: dict[int, int] = {}
        for score, share in ((echo, self.echo), (induction, self.induction)):
            order = score.flatten().argsort(descending=True, stable=True)[: round(share * score.numel())]
            for rank, head in enumerate(order.tolist()):
                ranks[head] = min(rank, ranks.get(head, rank))
        return sorted(ranks, key=lambda head: (ranks[head], head))


def head_counts(ranked: list[int], num_heads: int, num_tokens: int, budget_tokens: int, protected: int) -> list[int]:
    """Tokens of each of `num_heads` heads, in all `num_heads` times the budget: all for as many of `ranked` as it holds."""
    total, least = num_heads * min(budget_tokens, num_tokens), min(protected, budget_tokens, num_tokens)
    affordable = len(ranked)
    while affordable and affordable * num_tokens + (num_heads - affordable) * least > total:
        affordable -= 1
    whole = set(ranked[:affordable])
    others = [head for head in range(num_heads) if head not in whole]
    counts = [num_tokens] * num_heads
    if others:
        each, rest = divmod(total - len(whole) * num_tokens, len(others))
        for place, head in enumerate(others):
            counts[head] = min(num_tokens, each + (place < rest))
    return counts
