"""The text form of recipes, `snapkv(window=64) | adakv | kivi(bits=2) @ 20%`, read with the standard `ast`, literals only.

A name with its budget alone, `ems @ 25%`, is the whole paper, with the stages that it has beside that one, or a recipe of our
own, `shorthand @ 25%` (both in `methods/named.py`).
"""

from __future__ import annotations

import ast
import warnings
from dataclasses import fields
from typing import Any, cast

from steno.errors import BadArgument, BudgetError, RecipeError, nearest
from steno.methods import COMPOSITIONS, KINDS, METHODS, Method, stage_text, whole_paper
from steno.methods.checks import shown
from steno.recipe.budget import WHOLE, Budget
from steno.recipe.chain import FULL, REPEATING, Recipe

MAX_CHARS = 1000


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
