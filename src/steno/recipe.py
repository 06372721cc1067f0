"""Recipes: a chain of stages and one budget, and their text form, `snapkv(window=64) | adakv | kivi(bits=2) @ 20%`.

A name with its budget alone, `ems @ 25%`, is the whole paper, with the stages that it has beside that one, or a recipe of our
own, `shorthand @ 25%` (both in `methods/named.py`).
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, cast, final

from steno.errors import BadArgument, BudgetError, RecipeError, nearest
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
from steno.types import Need

MAX_CHARS = 1000
REPEATING = "transform"
"""The kind of which a recipe may have several."""
_UNITS = {
    unit.lower(): size
    for unit, size in [("B", 1)]
    + [(f"{prefix}B", 1000**power) for power, prefix in enumerate("kMGT", 1)]
    + [(f"{prefix}iB", 1024**power) for power, prefix in enumerate("KMGT", 1)]
}
_NUMBER = re.compile(r"([0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})\s*(%|[A-Za-z]*)", re.ASCII)
_EXAMPLES = "write tokens per KV head (`512`), a share of the prompt (`20%`) or bytes (`64MiB`)"


def _share(value: object) -> Fraction:
    """A share above 0 and at most 1, to 12 decimals."""
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction) or math.isnan(value):
        raise BudgetError(f"a share of the prompt must be a number; got share={shown(value)}.")
    if not 0 < value <= 1:
        raise BudgetError(f"a share of the prompt must be above 0% and not over 100%; got {float(value):.6%}.")
    share = Fraction(round(Fraction(str(value)) * 10**12), 10**12)
    if share == 0:
        raise BudgetError(f"a share of the prompt must be above 0%; got share={shown(value)}.")
    return share


@final
@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a sequence may keep; exactly one of the three is given.

    Parameters
    ----------
    tokens : int
        Tokens per KV head, on average.
    share : Fraction or float
        Share of the prompt, above 0 and at most 1; kept exactly to 12 decimals.
    bytes : int
        Bytes of the whole sequence, all layers.

    Raises
    ------
    BudgetError
        If not exactly one is given, or it is of another type or out of range.
    """

    tokens: int | None = None
    share: Fraction | float | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        if len(given) != 1:
            raise BudgetError(f"a budget is one of tokens, share and bytes; got {', '.join(given) or 'none'}.")
        [(name, value)] = given.items()
        whole = isinstance(value, int) and not isinstance(value, bool)
        if name == "share":
            object.__setattr__(self, "share", _share(value))
        elif not whole or not 0 < value < 2**63:
            raise BudgetError(f"a budget in {name} must be a whole number > 0; got {name}={shown(value)}.")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget from its text form: `512`, `20%`, `64MiB`, `1.5GiB`, `800kB`."""
        match = _NUMBER.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            negative = isinstance(text, str) and text.strip().startswith("-")
            raise BudgetError(f"a budget must be {'> 0' if negative else 'readable'}: {_EXAMPLES}; got {shown(text)}.")
        number, unit = Fraction(match[1].rstrip(".")), match[2].lower()
        if unit == "%":
            return cls(share=number / 100)
        if unit == "" and "." in match[1]:
            raise BudgetError(f"never a bare ratio: write 20% or a number of tokens; got {shown(text)}.")
        if unit == "":
            return cls(tokens=int(number))
        if unit not in _UNITS:
            raise BudgetError(f"unknown unit {shown(match[2])} of a budget: {_EXAMPLES}.")
        return cls(bytes=int(number * _UNITS[unit]))

    def __str__(self) -> str:
        if self.tokens is not None:
            return str(self.tokens)
        if self.bytes is not None:
            size, unit = max((size, unit) for unit, size in _UNITS.items() if self.bytes % size == 0)
            return f"{self.bytes // size}{_spelled(unit)}"
        percent = cast(Fraction, self.share) * 100
        digits = f"{percent.numerator * 10**10 // percent.denominator:011d}"
        return f"{digits[:-10]}.{digits[-10:]}".rstrip("0").rstrip(".") + "%"


WHOLE = Budget(share=Fraction(1))
"""The budget that drops nothing."""


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
        if self.allocate is None or not self.allocate.across_layers:
            return
        name = self.allocate.id
        if self.propagate is not None and self.propagate.routes_layers:
            raise RecipeError(
                f"{name} compares the tokens of all layers, and {self.propagate.id} leaves some out of them: use another way "
                "to allocate, such as adakv."
            )
        if self.share is not None:
            raise RecipeError(
                f"{name} gives every layer a budget of its own, and {self.share.id} keeps the same tokens in several: use one."
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
            for stage in (self.allocate, self.merge):
                if stage is not None:
                    raise RecipeError(
                        f"{stage.id} needs a method that chooses tokens: e.g. `snapkv | {stage.id} @ 25%`."
                    )
            if self.budget != WHOLE:
                raise BudgetError(
                    f"a budget of {self.budget} needs a method that chooses tokens: e.g. `snapkv @ {self.budget}`."
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


def as_recipe(recipe: Recipe | str | None) -> Recipe:
    """A recipe from itself, its text, or None for the empty one."""
    if recipe is None:
        return FULL
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        return parse_recipe(recipe)
    raise RecipeError(f"a recipe is text, a Recipe or None; got {shown(recipe)}.")


def parse_recipe(text: str) -> Recipe:
    """A recipe from its text form.

    Raises
    ------
    RecipeError
        If the text cannot be read, names no method or argument of ours, or its parts cannot work together.
    """
    if not isinstance(text, str) or len(text) > MAX_CHARS:
        raise RecipeError(f"a recipe must be text of at most {MAX_CHARS} characters; got {shown(text)}.")
    chain, *budgets = _split_at(text)
    if len(budgets) > 1:
        raise RecipeError(f"a recipe has one budget, after one `@`; got {shown(text)}.")
    budget = Budget.parse(budgets[0].strip()) if budgets else None
    if chain.strip() == "full":
        return Recipe(budget=budget or WHOLE)
    nodes = _nodes(chain)
    ours = COMPOSITIONS.get(nodes[0].id) if len(nodes) == 1 and isinstance(nodes[0], ast.Name) else None
    stages = list(ours.stages) if ours is not None else [_build(node) for node in nodes]
    if budget is not None and len(stages) == 1:
        stages = list(whole_paper(stages[0]))
    by_kind = _in_order(stages)
    if "score" in by_kind and budget is None:
        name = ours.id if ours is not None else cast(Method, by_kind["score"]).id
        raise BudgetError(f"{name} chooses tokens, so the recipe needs a budget: e.g. `{name} @ 25%`.")
    return Recipe(budget=budget or WHOLE, **cast(dict[str, Any], by_kind))


def _split_at(text: str) -> list[str]:
    """The parts of `text` between the `@` that stand outside of quotes."""
    parts, start, quote, i = [], 0, "", 0
    while i < len(text):
        if quote:
            i += text[i] == "\\"  # what a backslash escapes closes nothing
            quote = "" if text[i : i + 1] == quote else quote
        elif text[i] in "'\"":
            quote = text[i]
        elif text[i] == "@":
            parts.append(text[start:i])
            start = i + 1
        i += 1
    return [*parts, text[start:]]


def _nodes(chain: str) -> list[ast.expr]:
    """The stages of `a | b | c` as syntax."""
    if not chain.strip():
        raise RecipeError("a recipe needs a stage: name a method, or write `full` for the whole cache.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what the parser only warns of, such as `1or 2`, is an error here
            node = ast.parse(chain.strip(), mode="eval").body
    except (Warning, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if any(not part.strip() for part in chain.split("|")):
            raise RecipeError(f"a recipe must not have an empty stage; got {shown(chain)}.") from None
        reason = " ".join(str(error.msg if isinstance(error, SyntaxError) else "invalid text").split())
        raise RecipeError(f"a recipe must read `stage | stage @ budget`; got {shown(chain)} ({reason}).") from None
    nodes = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        nodes.append(node.right)
        node = node.left
    return [node, *reversed(nodes)]


def _build(node: ast.expr) -> Method:
    """The method that `name` or `name(argument=literal, …)` stands for."""
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    if not isinstance(call.func, ast.Name):
        raise RecipeError("a stage must be `name` or `name(argument=value)`; got an expression.")
    name = call.func.id
    if name == "full":
        raise RecipeError("`full` is the whole cache and stands alone.")
    if name in COMPOSITIONS:
        stages = " | ".join(map(stage_text, COMPOSITIONS[name].stages))
        raise RecipeError(f"{name} is a whole recipe: write `{name} @ 25%`, or its stages to change some: `{stages}`.")
    if name not in METHODS:
        raise RecipeError(
            f"unknown method {shown(name)}; {nearest(name.lower(), [*METHODS, *COMPOSITIONS], where='`steno methods`')}"
        )
    try:
        return cast(Method, METHODS[name](**_arguments(name, call)))
    except RecipeError:
        raise
    except BadArgument as error:
        raise RecipeError(f"{name}: {error}") from None


def _arguments(name: str, call: ast.Call) -> dict[str, Any]:
    """The keyword arguments of a stage; literals only."""
    defaults = {f.name: f.default for f in fields(cast(Any, METHODS[name]))}
    if (call.args or call.keywords) and not defaults:
        raise RecipeError(f"{name} takes no arguments: write `{name}`.")
    if call.args:
        first, default = next(iter(defaults.items()))
        raise RecipeError(f"{name} takes its arguments by name: e.g. `{name}({first}={default!r})`.")
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg not in defaults:
            got = "`**`" if keyword.arg is None else shown(keyword.arg)
            raise RecipeError(f"{name} has no argument {got}; {nearest(keyword.arg or '', defaults)}")
        if keyword.arg in values:
            raise RecipeError(f"{name}: `{keyword.arg}` is given twice.")
        values[keyword.arg] = _literal(name, keyword.arg, keyword.value)
    return values


def _literal(name: str, argument: str, node: ast.expr) -> object:
    """A number, a string, True, False or None, with a sign before numbers."""
    sign = -1 if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        node = node.operand
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return sign * cast(float, node.value)
    elif isinstance(node, ast.Constant):
        return node.value
    raise RecipeError(f"{name}: `{argument}` must be a literal: a number, a string, True or False.")


def _in_order(stages: list[Method]) -> dict[str, Method | tuple[Method, ...]]:
    """The stages by kind, or an error if a kind comes twice or the order is not that of KINDS."""
    by_kind: dict[str, Method | tuple[Method, ...]] = {}
    for kind in KINDS:
        mine = tuple(stage for stage in stages if stage.kind == kind)
        if len(mine) > 1 and kind != REPEATING:
            twice = f"{mine[0].id} and {mine[1].id}"
            raise RecipeError(f"a recipe has at most one {kind} stage; got {twice}.")
        if mine:
            by_kind[kind] = mine if kind == REPEATING else mine[0]
    right = sorted(stages, key=lambda stage: KINDS.index(stage.kind))
    if stages != right:
        order = " | ".join(stage.id for stage in right)
        raise RecipeError(f"stages go {', '.join(KINDS)}: write `{order}`.")
    return by_kind


def _spelled(unit: str) -> str:
    """The usual spelling of a unit: B, kB, MB, KiB, MiB."""
    return unit.upper().replace("IB", "iB") if unit != "kb" else "kB"
