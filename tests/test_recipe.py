"""The text form of recipes: round trips, one-line errors that name the way out, and no traceback for any text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from steno.errors import BadArgument, BudgetError, RecipeError
from steno.methods import (
    ACCESSORS,
    ALLOCATORS,
    KINDS,
    MERGERS,
    METHODS,
    PROPAGATORS,
    QUANTIZERS,
    SCORERS,
    SHARERS,
    TRANSFORMS,
)
from steno.methods.merge.evict import Evict
from steno.methods.quantize.kivi import KIVI
from steno.methods.score.h2o import H2O
from steno.methods.score.snapkv import SnapKV
from steno.pipeline import with_weights
from steno.recipe import FULL, WHOLE, Budget, Recipe, as_recipe, parse_recipe
from steno.types import Need

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "gate": st.sampled_from(["sigmoid", "none"]),
    **dict.fromkeys(["layer", "frame_tokens"], st.none() | st.integers(1, 5000)),
    "pool": st.sampled_from(["avg", "max"]),
    "kernel": st.integers(0, 9).map(lambda n: 2 * n + 1),
    "group": st.sampled_from([16, 32, 64]),
    "bits": st.sampled_from([1, 2, 3, 4, 8]),
    **dict.fromkeys(["bits", "other_bits"], st.sampled_from([2, 4])),
    **dict.fromkeys(["outliers", "salient"], st.floats(0, 1)),
    **dict.fromkeys(["rank", "buffer_rank", "iterations"], st.integers(1, 100)),
    "buffer": st.integers(1, 9).map(lambda n: 64 * n),
    "dtype": st.sampled_from(["e4m3", "e5m2"]),
    "key_bits": st.floats(1, 2),
    "norm_correction": st.booleans(),
    "statistics": st.none() | st.text(min_size=1).filter(str.strip),
    "weights": st.none() | st.text(min_size=1).filter(str.strip),
    **dict.fromkeys(["recent_share", "stabilizers", "induction", "echo", "mass", "floor", "tau"], st.floats(0, 1)),
    **dict.fromkeys(["tau_init", "tau_end"], st.floats(1e-3, 1e3)),
    "noise": st.booleans(),
    "full_layers": st.sampled_from([None, "0", "0,3", "0, 1, 9"]),
    "offload": st.booleans(),
    "sigma": st.floats(1e-3, 1e3),
    "important_share": st.floats(0, 0.5),
    "recent_share": st.floats(0, 0.5),
    "size_on": st.sampled_from(["logit", "value"]),
    "strategy": st.sampled_from(["averaged", "pivotal", "weighted"]),
    "chunk": st.integers(2, 5000),
    "residual": st.integers(1, 9).map(lambda n: 64 * n),
    "layers": st.integers(2, 50),
}
"""Values of arguments of which few are good."""
BY_TYPE: dict[type, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(1, 5000),
    float: st.floats(0, 1),
    type(None): st.none() | st.text(min_size=1).filter(str.strip),
}
"""Values of other arguments, by the type of their default."""


def instances(table: dict[str, Any]) -> st.SearchStrategy[Any]:
    def values(cls: Any, f: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
        strategy = VALUES.get(f.name, BY_TYPE.get(type(f.default), st.just(f.default)))
        return st.just(f.default) | strategy.filter(lambda value: is_good(cls, f.name, value))

    def build(cls: Any) -> st.SearchStrategy[Any]:
        return st.builds(cls, **{f.name: values(cls, f) for f in dataclasses.fields(cls)})

    return st.one_of([build(cls) for cls in table.values()])


def is_good(cls: Any, name: str, value: object) -> bool:
    try:
        cls(**{name: value})
    except BadArgument:
        return False
    return True


budgets = st.one_of(
    st.builds(Budget, tokens=st.integers(1, 10**6)),
    st.builds(Budget, bytes=st.integers(1, 2**40)),
    st.builds(Budget, share=st.fractions(Fraction(1, 1000), 1)),
    st.builds(Budget, share=st.floats(1e-6, 1)),
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    score = draw(st.none() | instances(SCORERS))
    evicts = score is not None and score.evicts_while_decoding
    transform = () if evicts else tuple(draw(st.lists(instances(TRANSFORMS), max_size=3)))
    transform = tuple(stage for i, stage in enumerate(transform) if i == 0 or Need.ROPE not in stage.needs)
    share = None if evicts else draw(st.none() | instances(SHARERS))
    transform = tuple(stage for stage in transform if share is None or not stage.needs)
    merges = [merge for merge in MERGERS.values() if not evicts or not merge.counts_tokens]
    if share is not None or any(stage.heads_together for stage in transform):
        merges = [Evict]

    def fits(quantizer: Any) -> bool:
        """Codebooks of a model do not go with another basis."""
        plain = "weights" not in vars(quantizer) and vars(quantizer).get("statistics") is None
        return plain or (share is None and not transform)

    replays = score is not None and Need.REPLAY in score.needs
    propagate = None if replays or share is not None else draw(st.none() | instances(PROPAGATORS))
    alone = share is not None or (propagate is not None and propagate.routes_layers)
    allocators = {name: cls for name, cls in ALLOCATORS.items() if not (alone and cls.across_layers)}
    stages = {
        "propagate": propagate,
        "score": score,
        "allocate": draw(st.none() | instances(allocators)) if score else None,
        "merge": draw(st.none() | instances({cls.id: cls for cls in merges})) if score else None,
        "share": share,
        "transform": transform,
        "quantize": None if evicts else draw(st.none() | instances(QUANTIZERS).filter(fits)),
        "access": None if evicts else draw(st.none() | instances(ACCESSORS)),
    }
    budget = draw(budgets) if score else WHOLE
    try:
        return Recipe(**stages, budget=budget)
    except RecipeError:  # the rules above leave out most of what makes no sense, not all
        reject()


@given(recipe=recipes())
@settings(deadline=None)
def test_text_rebuilds_the_recipe(recipe: Recipe) -> None:
    assert parse_recipe(str(recipe)) == recipe
    assert recipe.needs == frozenset().union(*(stage.needs for stage in recipe.stages))


@given(budget=budgets)
def test_text_rebuilds_the_budget(budget: Budget) -> None:
    assert Budget.parse(str(budget)) == budget


def outcome(parse: Callable[[str], Any], text: str) -> tuple[Any, str]:
    """What `parse` made of the text, or None and the message of its RecipeError."""
    try:
        return parse(text), ""
    except RecipeError as error:
        return None, str(error)


NAMES = st.sampled_from(
    [*METHODS, "full", "|", "@", "(", ")", "window", "=", "1", "20%", "-", "'", ",", "\n", "#", "\\", "."]
)


@given(text=st.one_of(st.text(), st.lists(NAMES, max_size=12).map("".join), st.lists(NAMES, max_size=12).map(" ".join)))
@settings(max_examples=500, deadline=None)
def test_any_text_is_a_recipe_or_a_one_line_error(text: str) -> None:
    recipe, error = outcome(parse_recipe, text)
    assert "\n" not in error
    assert len(error) < 400
    assert recipe is None or parse_recipe(str(recipe)) == recipe


@given(text=st.text(max_size=12))
def test_any_text_is_a_budget_or_an_error(text: str) -> None:
    budget, error = outcome(Budget.parse, text)
    assert "\n" not in error
    assert budget is None or Budget.parse(str(budget)) == budget


def test_the_example_of_the_documentation() -> None:
    recipe = parse_recipe("snapkv(window=64) | adakv | kivi(bits=4) @ 20%")
    assert str(recipe) == "snapkv | adakv | kivi(bits=4) @ 20%"
    assert recipe.score == SnapKV()
    assert recipe.quantize == KIVI(bits=4)
    assert recipe.access is None
    assert recipe.budget == Budget(share=Fraction(1, 5))
    assert recipe.needs == {Need.QUERIES}
    assert recipe.evictor is None
    assert parse_recipe("h2o @ 64").evictor == H2O()


@pytest.mark.parametrize("other", ["hadamard", "palu", "minicache"])
@pytest.mark.parametrize("quantize", ["commvq", "kvquant(statistics='x')"])
def test_codebooks_of_a_model_stand_alone(other: str, quantize: str) -> None:
    with pytest.raises(RecipeError, match=f"{quantize[:6]}.*{other} changes them: use one of them"):
        parse_recipe(f"{other} | {quantize}")
    assert parse_recipe(f"snapkv | adakv | {quantize} @ 25%").quantize is not None
    named = with_weights(parse_recipe(f"{other} | kvquant"), lambda *_: "x", lambda _: "x")
    assert named.quantize == METHODS["kvquant"]()
    assert with_weights(parse_recipe("kvquant"), lambda *_: "x", lambda _: "x").quantize == METHODS["kvquant"](
        statistics="x"
    )


def test_full_and_as_recipe() -> None:
    assert str(FULL) == "full"
    assert FULL.needs == frozenset()
    assert FULL.stages == ()
    for text in ("full", " full ", "full @ 100%", None, FULL):
        assert as_recipe(text) == FULL
    with pytest.raises(RecipeError, match="text, a Recipe or None"):
        as_recipe(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("512", "tokens", 512),
        ("20%", "share", Fraction(1, 5)),
        ("33.3 %", "share", Fraction(333, 1000)),
        ("64MiB", "bytes", 64 * 2**20),
        ("1.5GiB", "bytes", 3 * 2**29),
        ("800kB", "bytes", 800_000),
        ("7B", "bytes", 7),
        ("12.5% of bytes", "bytes_share", Fraction(1, 8)),
        ("20%of  bytes", "bytes_share", Fraction(1, 5)),
    ],
)
def test_budgets(text: str, field: str, value: object) -> None:
    budget = Budget.parse(text)
    assert getattr(budget, field) == value
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a stage"),
        ("snapk @ 9", "unknown method 'snapk'; did you mean 'snapkv'"),
        ("snapkv(windw=4) @ 9", "no argument 'windw'; did you mean 'window'"),
        ("snapkv(64) @ 9", r"by name: e.g. `snapkv\(window=64\)`"),
        ("keydiff(64) @ 9", "keydiff takes no arguments"),
        ("snapkv(window=True) @ 9", "snapkv: `window` must be a whole number; got window=True."),
        ("snapkv(window=0) @ 9", "`window` must be >= 1; got window=0."),
        ("snapkv(window=2*3) @ 9", "must be a literal"),
        ("snapkv(window=1, window=2) @ 9", "given twice"),
        ("snapkv(**{}) @ 9", "no argument"),
        ("snapkv | tova @ 9", "at most one score stage; got snapkv and tova"),
        ("int4 | snapkv @ 9", r"write `snapkv \| int4`"),
        ("snapkv | | int4 @ 9", "empty stage"),
        ("snapkv | @ 9", "empty stage"),
        ("snapkv(window=8 @ 9", "must read `stage | stage @ budget`"),
        ("a.b @ 9", "got an expression"),
        ("full | int4", "stands alone"),
        ("adakv", "needs a method that chooses tokens"),
        ("h2o | int4 @ 9", "h2o evicts single tokens at every step"),
        ("gear | quest", "what gear stores is always read whole: use stages of plain pages"),
        ("palu | int4 | moba", "what palu stores is always read whole"),
        ("minicache | delta", "what minicache stores is always read whole"),
        ("snapkv | adakv | palu @ 9", "palu keeps the same tokens in all of them: use a way to allocate by layer"),
        ("snapkv | ems_heads | xkv @ 9", "xkv keeps the same tokens in all of them"),
        ("snapkv @ 9 @ 9", "one budget"),
        ("x" * 2000, "at most 1000 characters"),
    ],
)
def test_bad_recipes(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapkv", "snapkv chooses tokens, so the recipe needs a budget: e.g. `snapkv @ 25%`"),
        ("int4 @ 50%", "needs a method that chooses tokens: e.g. `snapkv | int4 @ 50%`"),
        ("full @ 9", "needs a method that chooses tokens"),
        ("snapkv @ 0", "> 0"),
        ("snapkv @ 0%", "above 0%"),
        ("snapkv @ -3", "> 0"),
        ("snapkv @ 120%", "not over 100%; got 120"),
        ("snapkv @ 120% of bytes", "share of the bytes must be above 0% and not over 100%; got 120"),
        ("snapkv @ 20% of tokens", "readable"),
        ("snapkv @ 0.2", "never a bare ratio: write 20% or a number of tokens"),
        ("snapkv @ 9 parsecs", "unknown unit 'parsecs'"),
        ("snapkv @", "readable"),
        ("snapkv @ 0.1B", "> 0"),
    ],
)
def test_bad_budgets(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        parse_recipe(text)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tokens": 1, "bytes": 1},
        {"tokens": True},
        {"tokens": 1.0},
        {"share": float("nan")},
        {"share": True},
        {"share": 0.5, "bytes_share": 0.5},
        {"bytes_share": 0},
        {"bytes": 0},
    ],
)
def test_bad_budget_objects(fields: dict[str, Any]) -> None:
    with pytest.raises(BudgetError):
        Budget(**fields)


def test_bad_recipe_objects() -> None:
    with pytest.raises(RecipeError, match="`quantize` must be a method of that kind"):
        Recipe(quantize=SnapKV(), budget=WHOLE)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="`budget` must be a Budget"):
        Recipe(budget="20%")  # type: ignore[arg-type]
    assert list(KINDS).index("score") == 1


@pytest.mark.parametrize("name", ["a@b", "it's @ 5%", 'a "quote" @', "back\\slash@", "|", "#"])
def test_a_file_name_may_hold_any_character(name: str) -> None:
    recipe = parse_recipe(f"expected_attention(statistics={name!r}) @ 20%")
    assert getattr(recipe.score, "statistics", None) == name
    assert parse_recipe(str(recipe)) == recipe


def test_transforms_repeat_and_keep_their_order() -> None:
    recipe = parse_recipe("snapkv | hadamard | hadamard | int4 @ 25%")
    assert len(recipe.transform) == 2
    assert str(recipe) == "snapkv | hadamard | hadamard | int4 @ 25%"
    with pytest.raises(RecipeError, match="hadamard cannot follow"):
        parse_recipe("tova | hadamard @ 20")
    with pytest.raises(RecipeError, match="must be a tuple"):
        Recipe(transform=recipe.transform[0], budget=WHOLE)  # type: ignore[arg-type]


def test_what_takes_rope_back_comes_first() -> None:
    assert [stage.id for stage in parse_recipe("palu | hadamard | int8").transform] == ["palu", "hadamard"]
    for chain in ("think | palu", "hadamard | cskv", "palu | cskv"):
        with pytest.raises(RecipeError, match="be the first transform"):
            parse_recipe(chain)


@pytest.mark.parametrize(
    "chain", ["rotatekv | think", "palu | think", "cskv | think | int4", "palu | hadamard | think"]
)
def test_what_looks_at_queries_does_not_stand_behind_keys_before_rope(chain: str) -> None:
    with pytest.raises(RecipeError, match=r"think chooses by the queries, and .* from before RoPE"):
        parse_recipe(chain)
