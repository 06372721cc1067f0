"""SentenceKV: sentences whose mean key agrees with what the present sentence asks for are fetched whole.

Source: Zhu, Falahati, Yang, Amiri, 2025, https://arxiv.org/abs/2504.00970; the authors' code zzbright1998/SentenceKV.
Differs: this is the retrieval alone; the paper keeps a pool of the prompt by SnapKV before, so its recipe is
    `snapkv(window=32, kernel=7) | sentencekv @ BUDGET` with a budget of some times `tokens`. Sentences are ranked per KV head by
    the mean query of its group, as tokens are held per KV head. Generated tokens become sentences of the index when they
    leave the tail, which is always read and counts as recent; a sentence that is cut there is two. Sentences end at
    `. ! ? 。 ！ ？` and at blank lines, and after `max_sentence` tokens, which are then read in part instead of being dropped.
    A step of several tokens reads everything and begins the mean query anew, as a rollback does.
Cost: 2*Hkv*N*D FLOPs per step with N sentences; one fp32 key per sentence and KV head held beside the tokens. Saves reads;
    with `offload` the tokens lie in a file, which is not memory, and are not fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.cache.access import AccessStep, Choice
from steno.cache.ragged import beyond
from steno.methods.checks import require_bool, require_int
from steno.types import IndexItems, Need


@final
@dataclass(frozen=True, kw_only=True)
class SentenceKV:
    """Read the sentences with the largest products of mean key and mean query.

    Parameters
    ----------
    tokens : int, default 1024 tokens
        How much each KV head reads per step, sinks and recent tokens included; the first tokens of a sentence read all.
    sinks : int, default 32 tokens
        First tokens held, read in any case.
    recent : int, default 32 tokens
        Newest tokens, read in any case.
    dense_steps : int, default 1 step
        The first steps of each sentence, which read everything.
    max_sentence : int, default 128 tokens
        Longer sentences are cut.
    offload : bool, default False
        Whether the tokens that leave the tail lie in a memory-mapped file instead of in memory; for models on the CPU.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    """

    id: ClassVar[str] = "sentencekv"
    kind: ClassVar[str] = "access"
    title: ClassVar[str] = "SentenceKV"
    paper: ClassVar[str] = "SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching"
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2504.00970"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.TOKEN_TEXT})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = False
    differs: ClassVar[str] = (
        "The retrieval alone, to stand behind snapkv; sentences are ranked per KV head by the mean query of its group, and "
        "enter the index when they leave the tail, which is always read; long sentences are cut instead of dropped."
    )
    reads_all: ClassVar[bool] = False
    summarizes: ClassVar[bool] = True

    tokens: int = 1024
    sinks: int = 32
    recent: int = 32
    dense_steps: int = 1
    max_sentence: int = 128
    offload: bool = False

    def __post_init__(self) -> None:
        require_int("tokens", self.tokens, 1)
        require_int("sinks", self.sinks, 0)
        require_int("recent", self.recent, 0)
        require_int("dense_steps", self.dense_steps, 0)
        require_int("max_sentence", self.max_sentence, 1)
        require_bool("offload", self.offload)

    def reads_layer(self, layer_idx: int, num_layers: int) -> bool:
        return False

    def fix(self, keys: Sequence[Tensor], layer_idx: int, num_layers: int) -> None:
        return None

    def summarize(self, keys: Tensor, fixed: Tensor | None, sentences: Tensor | None) -> IndexItems:
        """The mean key of each sentence, `[items, D]` fp32, and its tokens."""
        assert sentences is not None, "the host tells sentences with TOKEN_TEXT"
        place = torch.arange(len(keys))
        first = sentences.diff(prepend=sentences[:1] - 1) != 0  # [n]
        start = torch.where(first, place, 0).cummax(0).values if len(keys) else place
        item = (first | ((place - start) % self.max_sentence == 0)).cumsum(0) - 1  # [n]
        lengths = torch.bincount(item)
        sums = keys.new_zeros(len(lengths), keys.shape[1], dtype=torch.float32)
        sums.index_add_(0, item.to(keys.device), keys.float())
        return IndexItems(vectors=sums / lengths.to(keys.device)[:, None], lengths=lengths.to(keys.device, torch.int32))

    def choose(self, step: AccessStep) -> Choice | None:
        """Sinks, recent tokens and the best sentences up to the budget, the last of them in part."""
        mean, count = self._mean_query(step)  # [R, D], [B]
        dense = count <= self.dense_steps
        if bool(dense.all()) or not int(step.head_tokens.max()):
            return None
        scores, lengths = step.rank(mean[:, None])[:, 0], step.item_lengths()  # [R, items]
        held, device = step.head_tokens.to(scores.device)[:, None], scores.device
        newest = (self.recent - step.tail_tokens).clamp(min=0).to(device)[:, None]  # in segments
        ends = lengths.cumsum(1)
        begin = (ends - lengths).clamp(min=self.sinks)  # of what is not read in any case
        free = (torch.minimum(ends, held - newest) - begin).clamp(min=0)
        room = (self.tokens - self.sinks - step.tail_tokens.clamp(min=self.recent)).clamp(min=0).to(device)[:, None]
        order = scores.argsort(dim=1, descending=True, stable=True)
        sizes = free.gather(1, order)
        taken = (room - (sizes.cumsum(1) - sizes)).clamp(min=0).minimum(sizes)
        share = torch.zeros_like(free).scatter(1, order, taken)  # of each item

        place = torch.arange(int(held.max()), device=device).expand(len(scores), -1).contiguous()  # [R, n]
        item = torch.searchsorted(ends, place, right=True).clamp(max=ends.shape[1] - 1)
        inside = (place - begin.gather(1, item) < share.gather(1, item)) & (place >= begin.gather(1, item))
        everything = dense.to(device).repeat_interleave(step.num_kv_heads)[:, None]
        chosen = inside | (place < self.sinks) | (place >= held - newest) | everything
        return Choice(tokens=chosen & ~beyond(step.head_tokens, chosen.shape[1], device))

    def _mean_query(self, step: AccessStep) -> tuple[Tensor, Tensor]:
        """The mean query of the present sentence, `[R, D]`, and of how many tokens it is, `[B]`; takes the new one in."""
        assert step.shared.text is not None, "the host announces the text"
        sentence = step.shared.text.newest()  # [B]
        query = step.queries.mean(1).unflatten(0, (step.num_rows, -1))  # [B, Hkv, D]
        total, count = query, torch.ones_like(sentence)
        if step.state:
            goes_on = step.state["sentence"] == sentence
            count = torch.where(goes_on, step.state["count"] + 1, 1)
            total = query + step.state["total"] * goes_on.to(query.device)[:, None, None]
        step.state.update(sentence=sentence, count=count, total=total)
        return (total / count.to(total.device)[:, None, None]).flatten(0, 1), count

    def index_bytes(self, head_dim: int, number_bytes: int) -> tuple[int, int]:
        return 4 * head_dim + 4, 4 * head_dim + 16
