"""A recipe as the cache runs it: score, allocate, select, merge; and what the pages and later steps look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from steno.bytes_budget import LayerRoom
from steno.cache.policy import (
    Allocation,
    Attender,
    Evictor,
    Reader,
    Router,
    SegmentEncoder,
    Selection,
    Selector,
    Sharer,
    Transform,
)
from steno.errors import BudgetError, RecipeError
from steno.methods import METHODS, Evict, Scorer, Uniform, stage_text
from steno.recipe import WHOLE, Recipe
from steno.types import LayerKV, Need, Observation, PageFormat, Widths

DENSE_RESIDUAL_TOKENS = 64
"""Without a quantize stage the tail becomes a dense segment when it holds this many tokens."""


@final
@dataclass(frozen=True)
class RecipePolicy:
    """What `recipe` asks of every layer."""

    recipe: Recipe

    @property
    def needs(self) -> frozenset[Need]:
        return self.recipe.needs

    @property
    def query_window(self) -> int:
        stages = (self.recipe.propagate, self.recipe.score, *self.recipe.transform)
        return max((stage.query_window for stage in stages if stage is not None), default=0)

    @property
    def query_statistics_skip(self) -> int:
        return self.recipe.score.query_statistics_skip if self.recipe.score is not None else 0

    @property
    def page_format(self) -> PageFormat | None:
        return self.recipe.quantize.page_format if self.recipe.quantize is not None else None

    @property
    def heads_together(self) -> bool:
        """Whether a method keeps all heads of a token together, so that all choose the same: by their mean score."""
        return any(transform.heads_together for transform in self.recipe.transform)

    @property
    def sharer(self) -> Sharer | None:
        return self.recipe.share

    def group(self, layer_idx: int, num_layers: int) -> range:
        """The layers that are compressed together with this one."""
        allocate, share = self.recipe.allocate, self.recipe.share
        if allocate is not None and allocate.across_layers and self.recipe.budget != WHOLE:
            return range(num_layers)
        return range(layer_idx, layer_idx + 1) if share is None else share.group(layer_idx, num_layers)

    @property
    def encoder(self) -> SegmentEncoder | None:
        quantizer = self.recipe.quantize
        return cast(SegmentEncoder, quantizer) if quantizer is not None and quantizer.page_format is None else None

    @property
    def transforms(self) -> Sequence[Transform]:
        return self.recipe.transform

    @property
    def residual_tokens(self) -> int:
        if self.recipe.quantize is not None:
            return self.recipe.quantize.residual_tokens
        return max((transform.residual_tokens for transform in self.recipe.transform), default=DENSE_RESIDUAL_TOKENS)

    @cached_property
    def evictor(self) -> Evictor | None:
        """The method that keeps the budget while decoding; a budget of 100% is never over."""
        return self.recipe.evictor if self.recipe.budget != WHOLE else None

    @property
    def reader(self) -> Reader | None:
        """The method, if it can evict while the prompt is read."""
        return self.recipe.reader

    @property
    def router(self) -> Router | None:
        stage = self.recipe.propagate
        return cast(Router, stage) if stage is not None and stage.routes_layers else None

    @property
    def attender(self) -> Attender | None:
        stage = self.recipe.propagate
        return None if stage is None or stage.routes_layers else cast(Attender, stage)

    @property
    def selector(self) -> Selector | None:
        access = self.recipe.access
        return access if access is not None and not access.reads_all else None

    def check_widths(self, num_kv_heads: int, head_dim: int, num_sharing: int) -> None:
        """Raises RecipeError if the quantize stage would get keys and values of unlike widths and cannot take them."""
        recipe = self.recipe
        widths = Widths(heads=num_kv_heads, keys=head_dim, values=head_dim)
        if recipe.share is not None and num_sharing > 1:
            widths = recipe.share.stored(widths, num_sharing)
        for transform in recipe.transform:
            widths = transform.stored(widths)
        if recipe.quantize is not None and self.encoder is not None and widths.keys != widths.values:
            before = " | ".join(stage.id for stage in (recipe.share, *recipe.transform) if stage is not None)
            raise RecipeError(
                f"{recipe.quantize.id} stores keys and values of one width, and {before} leaves {widths.keys} and "
                f"{widths.values} numbers a token: use a stage of plain pages, such as int4."
            )

    def budget_tokens(self, kv: LayerKV, num_layers: int, prompt_tokens: int | None = None) -> int:
        """Tokens per KV head that a sequence may keep; raises BudgetError if that is less than the method protects."""
        budget, num_tokens = self.recipe.budget, kv.num_tokens
        whole = num_tokens if prompt_tokens is None else prompt_tokens
        if budget.tokens is not None:
            tokens = budget.tokens
        elif budget.share is not None:
            tokens = int(whole * budget.share)
        else:
            tokens = self._room(kv, num_layers, whole).sure_tokens()
        self.check_budget(tokens, num_tokens)
        return tokens if self.evictor is not None else min(tokens, whole)

    def check_budget(self, tokens: int, num_tokens: int) -> None:
        """Raises BudgetError if `tokens` cannot hold what the scorer protects of a prompt of `num_tokens`."""
        score = self.recipe.score
        least = max(1, score.min_tokens) if score is not None else 1
        if tokens < min(least, num_tokens):
            name = score.id if score is not None else "a cache"
            # a paper's name stands for stages that have these arguments
            chain = " | ".join(map(stage_text, self.recipe.stages))
            where = (
                "" if name in str(self.recipe) else f", as an argument of {name} in `{chain} @ {self.recipe.budget}`"
            )
            raise BudgetError(
                f"a budget of {self.recipe.budget} is {tokens} of {num_tokens} tokens per KV head, but {name} always keeps "
                f"{least} (sinks and window): raise the budget or lower the method's window{where}."
            )

    def _room(self, kv: LayerKV, num_layers: int, prompt_tokens: int, num_sharing: int | None = None) -> LayerRoom:
        return LayerRoom.of(self.recipe, self, kv, num_layers, prompt_tokens, num_sharing)

    def _can_grow(self, kv: LayerKV, observation: Observation) -> bool:
        """Whether a budget in bytes may hold more tokens than surely fit: what stays dense is known when tokens are chosen."""
        is_bytes = self.recipe.budget.in_bytes and self.evictor is None
        return is_bytes and observation.budget_tokens < kv.num_tokens and observation.positions is None

    def select(self, kv: LayerKV, observation: Observation, allocation: Allocation | None = None) -> Selection:
        """Which tokens stay; ties go to the earlier token."""
        if self.recipe.score is None or allocation is not None or not self._can_grow(kv, observation):
            return self._select(kv, observation, allocation)
        room = self._room(kv, observation.num_layers, kv.num_tokens, num_sharing=1)
        if self.recipe.allocate is not None and self.recipe.allocate.by_layer:
            return self._select_by_layer(kv, observation, room)
        if self.recipe.allocate is None and self.recipe.merge is None:
            return self._select(kv, replace(observation, budget_tokens=room.most_alike(observation.budget_tokens)))

        def attempt(tokens: int) -> Selection | None:
            found = self._select(kv, replace(observation, budget_tokens=tokens))
            lengths = [kv.num_tokens] * kv.num_kv_heads if found.kept is None else [len(index) for index in found.kept]
            return found if room.bytes_of(lengths, is_ragged=found.log_counts is not None) <= room.num_bytes else None

        return room.most(attempt, observation.budget_tokens) or self._select(kv, observation)

    def _select_by_layer(self, kv: LayerKV, observation: Observation, room: LayerRoom) -> Selection:
        """Where layers have numbers of their own, which an allocator knows of all: those that fit together."""
        score, num_layers = self.recipe.score, observation.num_layers
        assert score is not None, "asked of methods that choose"

        def attempt(tokens: int) -> Selection | None:
            seen = replace(observation, budget_tokens=tokens)
            scores = self._scores(score, kv, _shown_to(score, seen), None)
            layers = [self._counts(scores, replace(seen, layer_idx=i)) for i in range(num_layers)]
            if sum(map(room.bytes_of, layers)) > num_layers * room.num_bytes:
                return None
            return self._select(kv, seen, Allocation(scores=scores, counts=layers[seen.layer_idx]))

        # entries that merged may be fewer, of which more stay dense
        found = room.most(attempt, observation.budget_tokens) if self.recipe.merge is None else None
        return found or self._select(kv, observation)

    def _select(self, kv: LayerKV, observation: Observation, allocation: Allocation | None = None) -> Selection:
        score = self.recipe.score
        if score is None:
            return Selection(kv=kv)
        observation = _shown_to(score, observation)
        state = None
        if self.evictor is not None and (evictor := self.recipe.evictor) is not None:
            state = evictor.prefill_state(kv, observation)
        if observation.budget_tokens >= self._divided_tokens(kv.num_tokens, observation):
            return Selection(kv=kv, state=list(state) if state is not None else None)
        if allocation is not None:
            scores, counts = allocation.scores, allocation.counts
        else:
            scores = self._scores(score, kv, observation, state)
            counts = self._counts(scores, observation)
        kept = _best(scores, counts)
        mask = _mask(kept, kv.num_tokens)
        merged = (self.recipe.merge or Evict()).merge(kv, mask, scores, observation)
        if merged.kept is not mask:
            kept = [row.nonzero()[:, 0] for row in merged.kept]
        return Selection(
            kv=merged.kv,
            kept=kept,
            state=[s[i] for s, i in zip(state, kept, strict=True)] if state is not None else None,
            log_counts=[c[i].log() for c, i in zip(merged.counts, kept, strict=True)]
            if merged.counts is not None
            else None,
        )

    def allocate_across(
        self, kvs: Sequence[LayerKV], observations: Sequence[Observation]
    ) -> Sequence[Allocation | None]:
        """What each layer may keep, by the scores of all as of one layer with the heads of all."""
        budget, num_tokens = observations[0].budget_tokens, kvs[0].num_tokens
        if self.recipe.score is None or self.recipe.allocate is None or budget >= num_tokens:
            return [None] * len(kvs)
        if self.recipe.merge is not None or not self._can_grow(kvs[0], observations[0]):
            return self._allocations(kvs, observations)
        room = self._room(kvs[0], observations[0].num_layers, num_tokens)

        def attempt(tokens: int) -> list[Allocation] | None:
            found = self._allocations(kvs, [replace(x, budget_tokens=tokens) for x in observations])
            return found if sum(room.bytes_of(x.counts) for x in found) <= len(found) * room.num_bytes else None

        return room.most(attempt, budget) or self._allocations(kvs, observations)

    def _allocations(self, kvs: Sequence[LayerKV], observations: Sequence[Observation]) -> list[Allocation]:
        """Of a budget that does not hold everything."""
        score, allocate, budget = self.recipe.score, self.recipe.allocate, observations[0].budget_tokens
        assert score is not None, "asked of methods that choose"
        assert allocate is not None, "asked of methods that choose"
        scores = []
        for kv, observation in zip(kvs, observations, strict=True):
            seen = _shown_to(score, observation)
            state = None if self.recipe.evictor is None else self.recipe.evictor.prefill_state(kv, seen)
            scores.append(self._scores(score, kv, seen, state))
        counts = allocate.allocate(torch.cat(scores), budget_tokens=budget, layer_idx=0, num_layers=1)
        parts = counts.split([len(x) for x in scores])
        return [Allocation(scores=x, counts=self._of_heads(part)) for x, part in zip(scores, parts, strict=True)]

    def _scores(self, score: Scorer, kv: LayerKV, observation: Observation, state: Tensor | None) -> Tensor:
        """Scores `[Hkv, S]`; state: of a method that goes on evicting, after the prompt."""
        if state is not None and self.recipe.evictor is not None:
            positions = kv.positions.expand(kv.num_kv_heads, -1)
            scores = self.recipe.evictor.priority(state, positions, observation.budget_tokens)
        else:
            scores = score.score(kv, observation)
        return _mean_score([scores]) if self.heads_together else scores

    def _divided_tokens(self, num_tokens: int, observation: Observation) -> int:
        """The tokens that a budget is laid out for: those of a layer, or of the whole prompt where layers divide it."""
        if self.recipe.allocate is None or not self.recipe.allocate.by_layer:
            return num_tokens
        return observation.prompt_tokens or num_tokens

    def _counts(self, scores: Tensor, observation: Observation) -> list[int]:
        """How many tokens each head keeps."""
        num_tokens = scores.shape[1]
        gone = self._divided_tokens(num_tokens, observation) - num_tokens  # round this layer
        counts = (self.recipe.allocate or Uniform()).allocate(
            pad(scores, (0, gone), value=-torch.inf),
            budget_tokens=observation.budget_tokens,
            layer_idx=observation.layer_idx,
            num_layers=observation.num_layers,
        )
        return self._of_heads(counts.clamp(max=num_tokens))

    def _of_heads(self, counts: Tensor) -> list[int]:
        """The counts of the heads of a layer, all the same where they keep their tokens together."""
        if self.heads_together:  # an allocator may give a rest to some
            counts = torch.full_like(counts, int(counts.sum()) // len(counts))
        return counts.tolist()

    def select_together(self, kvs: Sequence[LayerKV], observations: Sequence[Observation]) -> list[Selection]:
        """Which tokens stay in all layers of a group and all their heads: those of the best mean score."""
        score = self.recipe.score
        if score is None or observations[0].budget_tokens >= kvs[0].num_tokens:
            return [Selection(kv=kv) for kv in kvs]
        seen = [_shown_to(score, observation) for observation in observations]
        scores = _mean_score([score.score(kv, x) for kv, x in zip(kvs, seen, strict=True)])
        per_head = [n for x in seen for n in self._counts(scores, x)]  # layers may have budgets of their own
        count = sum(per_head) // len(per_head)
        apart = self.recipe.allocate is None or not self.recipe.allocate.by_layer
        if apart and self._can_grow(kvs[0], observations[0]):
            room = self._room(kvs[0], observations[0].num_layers, kvs[0].num_tokens, num_sharing=len(kvs))
            count = room.most_alike(count)
        kept = _best(scores[:1], [count]) * kvs[0].num_kv_heads
        return [Selection(kv=kv, kept=kept) for kv in kvs]


def _shown_to(score: Scorer, observation: Observation) -> Observation:
    """What a scorer asked for: another stage may look at more queries."""
    if observation.queries is None:
        return observation
    first = max(0, observation.queries.shape[1] - score.query_window)
    return replace(observation, queries=observation.queries[:, first:])


def _mean_score(scores: Sequence[Tensor]) -> Tensor:
    """The mean over layers and heads, the same for every head: `[Hkv, S]` each to `[Hkv, S]`."""
    return torch.stack(list(scores)).mean((0, 1)).expand_as(scores[0]).contiguous()


def _best(scores: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The `counts[h]` highest of scores `[Hkv, S]`, ascending by position; ties go to the earlier token."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return [order[h, :n].sort().values for h, n in enumerate(counts)]


def with_weights(
    recipe: Recipe, find: Callable[[str, str], str], known: Callable[[str], str | None] = lambda method_id: None
) -> Recipe:
    """The recipe with the file of what they learned named in every method that has a place for one and names none.

    find: the file by the id of the method and the command that makes it, for methods that cannot do without (`weights`).
    known: the file by the id, or None if there is none, for those that can (`statistics`).
    """

    def named(stage: Any) -> Any:
        unnamed = {f.name for f in fields(stage) if getattr(stage, f.name) is None}
        if "weights" in unnamed:
            return replace(stage, weights=find(stage.id, "train" if METHODS[stage.id].trained else "calibrate"))
        changed = stage.kind == "quantize" and (recipe.transform or recipe.share)  # they would not fit
        if "statistics" in unnamed and not changed and (path := known(stage.id)) is not None:
            return replace(stage, statistics=path)
        return stage

    single = {stage.kind: named(stage) for stage in recipe.stages if stage.kind != "transform"}
    return replace(recipe, **single, transform=tuple(named(stage) for stage in recipe.transform))


def _mask(kept: list[Tensor], num_tokens: int) -> Tensor:
    mask = torch.zeros(len(kept), num_tokens, dtype=torch.bool, device=kept[0].device)
    for row, index in zip(mask, kept, strict=True):
        row[index] = True
    return mask
