"""Named recipes: papers that are several stages at once, wherever a recipe can stand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import steno
from steno.calibration import save_calibration
from steno.errors import BudgetError, RecipeError
from steno.methods import (
    COMPOSITIONS,
    KINDS,
    METHODS,
    NAMED,
    EMSHeads,
    GlobalLocal,
    describe_methods,
    stage_text,
    whole_paper,
)
from steno.recipe import Recipe, parse_recipe
from tiny import prompt, shared
from tiny_vlm import IMAGE, inputs, vlm


@pytest.mark.parametrize("name", NAMED)
def test_a_name_alone_is_the_whole_paper(name: str) -> None:
    stages = whole_paper(METHODS[name]())
    assert len(stages) > 1
    assert [KINDS.index(stage.kind) for stage in stages] == sorted(KINDS.index(stage.kind) for stage in stages)
    short = parse_recipe(f"{name} @ 40%")
    assert short.stages == stages
    assert short == parse_recipe(f"{' | '.join(map(stage_text, stages))} @ 40%")
    assert str(short) == f"{name} @ 40%"
    assert parse_recipe(f"{name} @ 100%").stages == stages


@pytest.mark.parametrize("name", [name for name in NAMED if METHODS[name].kind == "merge"])
def test_in_a_chain_the_name_is_the_stage(name: str) -> None:
    recipe = parse_recipe(f"snapkv | {name} @ 40%")
    assert recipe.stages == (METHODS["snapkv"](), METHODS[name]())
    assert str(recipe) == f"snapkv | {name} @ 40%"
    with pytest.raises(RecipeError, match="needs a method that chooses tokens"):
        parse_recipe(f"{name} | int8 @ 40%")
    with pytest.raises(RecipeError, match="needs a method that chooses tokens"):
        parse_recipe(name)


def test_arguments_go_to_the_stage_that_bears_the_name() -> None:
    recipe = parse_recipe("ems(gamma=0.5) @ 25%")
    assert recipe.merge == METHODS["ems"](gamma=0.5)
    assert recipe.score == GlobalLocal()
    assert recipe.allocate == EMSHeads()
    assert str(recipe) == "ems(gamma=0.5) @ 25%"
    assert str(parse_recipe("global_local | ems @ 25%")) == "global_local | ems @ 25%"
    with pytest.raises(RecipeError, match="ems has no argument 'window'"):
        parse_recipe("ems(window=9) @ 25%")


def test_a_recipe_in_python_has_no_hidden_stages() -> None:
    with pytest.raises(BudgetError, match="a budget of 25% needs"):
        Recipe(quantize=METHODS["int8"](), budget=parse_recipe("ems @ 25%").budget)  # type: ignore[arg-type]


CEILINGS = {"zipvl", "fastkv"}
"""Of which the budget is a ceiling: some layers may hold less."""


@pytest.mark.parametrize("name", NAMED)
def test_a_model_generates_under_the_name(name: str, tmp_path: Path) -> None:
    model, given = shared("llama"), {"input_ids": prompt(150)}
    if name == "look_m":
        model, given = vlm("llava"), inputs("llava", images=7)  # 150 tokens too
    model.set_attn_implementation("steno")
    learned = ""
    if name == "razorattention":
        path, heads = tmp_path / "heads.safetensors", torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
        save_calibration(path, {"induction": heads, "echo": -heads}, {})
        learned = f"(weights={str(path)!r})"
    cache = steno.KVCache(model.config, f"{name}{learned} @ 80", input_ids=given["input_ids"])
    with cache.watching(model):
        ids = model.generate(**given, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert ids.shape == (1, 154)
    held = [n for layer in cache.held_tokens() for row in layer for n in row]
    mean = sum(held) / len(held)
    assert mean == 83 or (name in CEILINGS and 3 < mean < 83)
    assert cache.kv_bytes < cache.kv_bytes_full
    cache.check_integrity()


def test_fastkv_alone_propagates_and_keeps_what_snapkv_of_its_paper_would() -> None:
    recipe = parse_recipe("fastkv(share=0.3) @ 10%")
    assert recipe == parse_recipe("fastkv(share=0.3) | snapkv(window=8, kernel=7, pool='max') @ 10%")
    model = shared("llama")
    model.set_attn_implementation("steno")
    cache = steno.KVCache(model.config, recipe)
    with torch.inference_mode(), cache.watching(model):
        model(prompt(200), past_key_values=cache)
    assert cache.held_tokens() == [[[20, 20]]] * 3  # a tenth of the prompt in every layer, as in the paper


def test_look_m_alone_keeps_text_first_and_merges_images_into_it() -> None:
    model, given = vlm("llava"), inputs("llava", images=7)
    model.set_attn_implementation("steno")
    is_image = given["input_ids"][0] == IMAGE
    assert int((~is_image).sum()) > 30
    states = {}
    for recipe in ("look_m @ 30", "text_prior @ 30"):
        cache = steno.KVCache(model.config, recipe, input_ids=given["input_ids"])
        with torch.inference_mode():
            model(**given, past_key_values=cache)
        states[recipe] = [layer.content.rows[0].segments[0].decode(torch.float32) for layer in cache.own_layers]
        for layer in cache.own_layers:
            for positions in layer.content.positions(0, len(is_image)):
                assert len(positions) == 30
                assert not is_image[positions].any()
    merged, plain = states.values()
    assert all(
        not torch.equal(a[0], b[0]) for x, y in zip(merged, plain, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_named_recipes_are_described_after_the_methods() -> None:
    rows = [row for row in describe_methods() if row["kind"] == "recipe"]
    assert [row["id"] for row in rows] == [*NAMED, *COMPOSITIONS]
    ems = next(row for row in rows if row["id"] == "ems")
    assert ems["title"] == "global_local | ems_heads | ems"
    assert ems["needs"] == ["ATTENTION_MASS", "QUERIES"]
    assert ems["frees_memory"]
    assert all("." in row["differs"] for row in rows)
    ours = next(row for row in rows if row["id"] == "shorthand")
    assert ours["title"] == "kvzip(window=96) | one_threshold(unit=64) | hadamard | int4"
    assert ours["needs"] == ["REPLAY"]


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_recipe_of_our_own_stands_alone(name: str) -> None:
    stages = COMPOSITIONS[name].stages
    recipe = parse_recipe(f"{name} @ 40%")
    assert recipe.stages == stages
    assert recipe == parse_recipe(f"{' | '.join(map(stage_text, stages))} @ 40%")
    assert str(recipe) == f"{name} @ 40%"
    assert name not in METHODS
    with pytest.raises(BudgetError, match=f"{name} chooses tokens, so the recipe needs a budget"):
        parse_recipe(name)
    for text in (f"{name} | int4 @ 40%", f"{name}(unit=1) @ 40%", f"snapkv | {name} @ 40%"):
        with pytest.raises(RecipeError, match="is a whole recipe: write"):
            parse_recipe(text)
