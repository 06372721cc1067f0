"""A chain of stages that work together, and one budget."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, cast, final

from steno.errors import BudgetError, RecipeError
from steno.methods import (
    COMPOSITIONS,
    KINDS,
    METHODS,
    NAMED,
    READERS,
    Access,
    Allocator,
    Evictor,
    Merger,
    Method,
    Propagator,
    Quantizer,
    Reader,
    Scorer,
    Sharer,
    Transform,
    stage_text,
    whole_paper,
)
from steno.methods.checks import shown
from steno.recipe.budget import WHOLE, Budget
from steno.types import Need

REPEATING = "transform"
"""The kind of which a recipe may have several."""


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """At most one method of each kind but transforms, and the budget; a kind that is None takes its default.

    Raises
    ------
    RecipeError
        If a method stands in a place of another kind, or the parts cannot work together.
    """

    propagate: Propagator | None = None
    score: Scorer | None = None
    allocate: Allocator | None = None
    merge: Merger | None = None
    share: Sharer | None = None
    transform: tuple[Transform, ...] = ()
    quantize: Quantizer | None = None
    access: Access | None = None
    budget: Budget

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget):
            raise RecipeError(f"`budget` must be a Budget; got budget={shown(self.budget)}.")
        for kind in KINDS:
            for stage in self._of(kind):
                if not any(type(stage) is cls and cls.kind == kind for cls in METHODS.values()):
                    raise RecipeError(f"`{kind}` must be a method of that kind; got {kind}={shown(stage)}.")
        self._check_score()
        self._check_transforms()
        self._check_share()
        self._check_allocate()
        self._check_codebooks()
        self._check_access()
        if self.propagate is not None and Need.REPLAY in self.needs:
            raise RecipeError(
                f"{self.propagate.id} lets tokens go round layers, and a replay needs them in all: use it without kvzip."
            )
        if self.propagate is not None and self.share is not None:
            raise RecipeError(
                f"{self.propagate.id} lets tokens go round layers, and {self.share.id} keeps layers together: use one of them."
            )

    def _of(self, kind: str) -> tuple[Method, ...]:
        """The stages of a kind: one or none, but of transforms any number."""
        value = getattr(self, kind, None)
        if kind == REPEATING:
            if not isinstance(value, tuple):
                raise RecipeError(f"`{kind}` must be a tuple of methods; got {kind}={shown(value)}.")
            return value
        return () if value is None else (cast(Method, value),)

    def _check_transforms(self) -> None:
        for before, transform in zip(self.transform, self.transform[1:], strict=False):
            if Need.ROPE in transform.needs:
                raise RecipeError(
                    f"{transform.id} takes RoPE back from the keys as the model made them, and {before.id} changes them: let "
                    f"{transform.id} be the first transform, and the only one of its sort."
                )
            first = self.transform[0]  # no other takes RoPE back
            if Need.QUERIES in transform.needs and Need.ROPE in first.needs:
                raise RecipeError(
                    f"{transform.id} chooses by the queries, and {first.id} stores keys from before RoPE, each of which a "
                    "query meets in another way: use one of them."
                )
        for transform in self.transform:
            if self.evictor is not None:
                raise RecipeError(
                    f"{self.evictor.id} evicts single tokens at every step, which {transform.id} cannot follow: choose a "
                    "one-shot scorer such as snapkv."
                )
            if transform.heads_together and self.merge is not None and self.merge.id != "evict":
                raise RecipeError(
                    f"{transform.id} keeps all heads of a token together, and {self.merge.id} merges each head by itself: "
                    "use one of them."
                )

    def _check_share(self) -> None:
        if self.share is None:
            return
        if self.evictor is not None:
            raise RecipeError(
                f"{self.evictor.id} evicts single tokens of each layer, and {self.share.id} keeps layers together: choose a "
                "one-shot scorer such as snapkv."
            )
        if self.merge is not None and self.merge.id != "evict":
            raise RecipeError(
                f"{self.share.id} keeps layers together, and {self.merge.id} merges each by itself: use one."
            )
        for transform in self.transform:
            if transform.needs:
                raise RecipeError(
                    f"{transform.id} fits a basis to each layer, and {self.share.id} stores tensors common to several: use "
                    "one of them, or hadamard, which is the same for all."
                )

    def _check_allocate(self) -> None:
        if self.allocate is None:
            return
        name = self.allocate.id
        together: list[Method] = [transform for transform in self.transform if transform.heads_together]
        for stage in [*together, self.share]:
            if self.allocate.by_head and stage is not None:
                raise RecipeError(
                    f"{name} divides the budget of a layer among its heads, and {stage.id} keeps the same tokens in all of them: "
                    "use a way to allocate by layer, such as pyramidkv."
                )
        if not self.allocate.across_layers:
            return
        if self.propagate is not None and self.propagate.routes_layers:
            raise RecipeError(
                f"{name} compares the tokens of all layers, and {self.propagate.id} leaves some out of them: use another way "
                "to allocate, such as adakv."
            )
        if self.share is not None:
            raise RecipeError(
                f"{name} gives every layer a budget of its own, and {self.share.id} keeps the same tokens in several: use one."
            )

    def _check_access(self) -> None:
        """What attends by itself is always read whole."""
        if self.access is None or self.access.reads_all:
            return
        whole: list[Method | None] = [transform for transform in self.transform if not transform.keeps_spans]
        whole.append(self.share)
        if self.quantize is not None and self.quantize.page_format is None:
            whole.append(self.quantize)
        for stage in whole:
            if stage is not None:
                raise RecipeError(
                    f"{self.access.id} reads a part of the tokens at a step, and what {stage.id} stores is always read whole: "
                    "use stages of plain pages, such as hadamard | int4."
                )

    def _check_codebooks(self) -> None:
        """What was fitted to the keys and values of a model does not fit them in another basis."""
        stage = self.quantize
        given = {} if stage is None else {f.name: getattr(stage, f.name) for f in fields(cast(Any, stage))}
        if stage is None or ("weights" not in given and given.get("statistics") is None):
            return
        for other in (self.share, *self.transform):
            if other is not None:
                raise RecipeError(
                    f"{stage.id} has codebooks of keys and values as the model makes them, and {other.id} changes them: use "
                    "one of them."
                )

    def _check_score(self) -> None:
        if self.score is None:
            routes = [stage_text(stage) for stage in self._of("propagate")]
            others = [stage_text(stage) for stage in self.stages if stage.kind != "propagate"]
            chain = " | ".join([*routes, "snapkv", *others])
            for stage in (self.allocate, self.merge):
                if stage is not None:
                    raise RecipeError(f"{stage.id} needs a method that chooses tokens: e.g. `{chain} @ 25%`.")
            if self.budget != WHOLE:
                raise BudgetError(
                    f"a budget of {self.budget} needs a method that chooses tokens: e.g. `{chain} @ {self.budget}`."
                )
        elif self.score.evicts_while_decoding and self.merge is not None and self.merge.counts_tokens:
            raise RecipeError(
                f"{self.score.id} evicts single tokens at every step, and {self.merge.id} makes entries that stand for "
                "several: choose a one-shot scorer such as snapkv."
            )
        elif self.score.evicts_while_decoding and self.quantize is not None:
            raise RecipeError(
                f"{self.score.id} evicts single tokens at every step and pages are encoded only once: use it without "
                f"{self.quantize.id}, or choose a one-shot scorer such as snapkv."
            )
        elif self.score.evicts_while_decoding and self.access is not None and not self.access.reads_all:
            raise RecipeError(
                f"{self.score.id} must see all that is held to evict at every step, so {self.access.id} cannot leave a part "
                "unread: choose a one-shot scorer such as snapkv."
            )

    @property
    def stages(self) -> tuple[Method, ...]:
        """The methods that are given, in order."""
        return tuple(stage for kind in KINDS for stage in self._of(kind))

    @property
    def needs(self) -> frozenset[Need]:
        """What the host has to gather."""
        return frozenset().union(*(stage.needs for stage in self.stages))

    @property
    def evictor(self) -> Evictor | None:
        """The scorer, if it goes on choosing while decoding."""
        return cast(Evictor, self.score) if self.score is not None and self.score.evicts_while_decoding else None

    @property
    def acts_at_each_step(self) -> bool:
        """Whether it does something in every step of decoding: evicts tokens, or chooses which are read."""
        return self.evictor is not None or (self.access is not None and not self.access.reads_all)

    @property
    def reader(self) -> Reader | None:
        """The scorer, if it can evict while a prompt is read."""
        return cast(Reader, self.score) if self.score is not None and self.score.id in READERS else None

    def check_evicts_while_reading(self) -> None:
        """Raises RecipeError unless the recipe can evict while a prompt is read."""
        if self.reader is None:
            name = self.score.id if self.score is not None else "the full cache"
            raise RecipeError(f"{name} cannot evict while it reads; methods that can: {', '.join(READERS)}.")
        pages = self.quantize is None or self.quantize.page_format is not None
        for stage in self.stages:
            if stage.kind in ("propagate", "allocate", "merge", "share", "transform") or (
                stage.kind == "quantize" and not pages
            ):
                if stage.id in ("uniform", "evict"):
                    continue
                raise RecipeError(
                    f"{stage.id} needs the whole prompt at once: leave it out to evict while reading, or read in one piece."
                )

    def __str__(self) -> str:
        if not self.stages:
            return "full"
        alone = next((s for s in self.stages if s.id in NAMED and whole_paper(s) == self.stages), None)
        chain = " | ".join(map(stage_text, self.stages if alone is None else (alone,)))
        chain = next((name for name, ours in COMPOSITIONS.items() if ours.stages == self.stages), chain)
        return chain if self.score is None else f"{chain} @ {self.budget}"


FULL = Recipe(budget=WHOLE)
"""The empty recipe: nothing is dropped, nothing is coded."""
