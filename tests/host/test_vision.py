"""Vision-language models through the same host, with real vision towers and random images; models of text see none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import steno
from steno.cache.row import unpack_kept
from steno.errors import BadArgument, CacheError, ModelError, UnsupportedAttention
from steno.types import Need
from tiny import prompt, shared
from tiny_vlm import AFTER, BEFORE, BUILDERS, IMAGE, IMAGE_TOKENS, inputs, vlm

NEW_TOKENS = 8


def hosted(name: str) -> Any:
    model = vlm(name)
    model.set_attn_implementation("steno")
    return model


def generate(model: Any, cache: Any, given: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**given, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False, **options)


def cache_of(model: Any, recipe: str, given: dict[str, Tensor], **options: Any) -> steno.KVCache:
    return steno.KVCache(model.config, recipe, input_ids=given["input_ids"], **options)


WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}, "images": {}}


IDENTITIES = [(recipe, way) for recipe in ("full", "text_prior @ 100%", "fastkv(share=1)") for way in WAYS]
IDENTITIES.remove(("fastkv(share=1)", "beams"))  # one sequence at a time


@pytest.mark.parametrize(("recipe", "way"), IDENTITIES)
@pytest.mark.parametrize("name", BUILDERS)
def test_what_keeps_everything_is_token_identical(name: str, recipe: str, way: str) -> None:
    model, given = vlm(name), inputs(name, images=3 if way == "images" else 1)
    model.set_attn_implementation("sdpa")
    expected = generate(model, DynamicCache(config=model.config.get_text_config()), given, **WAYS[way])
    model.set_attn_implementation("steno")
    cache = cache_of(model, recipe, given)
    with cache.watching(model):
        out = generate(model, cache, given, **WAYS[way])
    assert torch.equal(out, expected)
    cache.check_integrity()


@pytest.mark.parametrize("name", BUILDERS)
def test_the_image_matters(name: str) -> None:
    """Otherwise the tests here would say nothing of images."""
    model, given = hosted(name), inputs(name)
    other = {**given, "pixel_values": given["pixel_values"].flip(0) * -1}
    with torch.no_grad():
        a, b = (model(**x, past_key_values=steno.KVCache(model.config)).logits[0, -1] for x in (given, other))
    assert (a - b).abs().max() > 0.1


@pytest.mark.parametrize("name", BUILDERS)
def test_methods_see_which_tokens_are_image_tokens(name: str) -> None:
    model, given = hosted(name), inputs(name, images=2)
    total = given["input_ids"].shape[1]
    cache = cache_of(model, "text_prior @ 50%", given, prompt_tokens=total + 1)
    with torch.no_grad():
        model(**given, past_key_values=cache)
    for layer in cache.own_layers:
        mask = layer.observation()[1].image_mask
        assert torch.equal(mask, given["input_ids"][0] == IMAGE)
        assert int(mask.sum()) == 2 * IMAGE_TOKENS


def test_padded_rows_and_chunks_see_their_own_image_tokens() -> None:
    model = hosted("llava")
    ids = prompt(40, 3) % 80 + 10
    ids[0, 10:20], ids[1, 15:30], ids[2, 30:] = IMAGE, IMAGE, IMAGE
    mask = torch.ones_like(ids)
    for b, pad in enumerate((0, 7, 19)):
        ids[b, :pad], mask[b, :pad] = 0, 0
    recipe = "text_prior(recent_share=0) @ 5"
    cache = steno.KVCache(model.config, recipe, input_ids=ids, prompt_tokens=40)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        for a, b in ((0, 25), (25, 40)):
            part = embeds[:, a:b]
            model(inputs_embeds=part, attention_mask=mask[:, :b], past_key_values=cache)
    for layer in cache.own_layers:
        for b, pad in enumerate((0, 7, 19)):
            for positions in layer.content.positions(b, 40 - pad):
                assert not (ids[b, pad + positions] == IMAGE).any()  # text is enough for the budget


@pytest.mark.parametrize("name", BUILDERS)
def test_text_prior_keeps_text_first(name: str) -> None:
    model, given = hosted(name), inputs(name, images=3)
    is_image = given["input_ids"][0] == IMAGE
    total, text = len(is_image), int((~is_image).sum())
    assert text == BEFORE + AFTER + 6
    for budget in (12, text, text + 7):
        cache = cache_of(model, f"text_prior(recent_share=0) @ {budget}", given)
        generate(model, cache, given)
        for layer in cache.own_layers:
            for positions in layer.content.positions(0, total):
                assert len(positions) == budget
                assert int(is_image[positions].sum()) == max(0, budget - text)
        assert cache.held_tokens() == [[[budget + NEW_TOKENS - 1] * 2]] * 3


RECIPES = [
    "text_prior | int8 @ 60%",
    "text_prior | adakv @ 40%",
    "look_m @ 30%",
    "vidkv_stp",
    "text_prior | adakv | vidkv_stp @ 80%",
    "snapkv(window=8) | kivi(bits=4) @ 50%",
    "fastkv(layer=0, share=0.4) | text_prior @ 30%",
    "h2o(heavy_share=1) | pyramidkv @ 40%",
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", BUILDERS)
def test_recipes_decode_on(name: str, recipe: str) -> None:
    model, given = hosted(name), inputs(name, images=8)
    total = given["input_ids"].shape[1]
    cache = cache_of(model, recipe, given)
    with cache.watching(model):
        out = generate(model, cache, given)
    assert out.shape[1] == total + NEW_TOKENS
    assert cache.seen_tokens == total + NEW_TOKENS - 1
    assert cache.kv_bytes < cache.kv_bytes_full
    cache.check_integrity()


@pytest.mark.parametrize("name", BUILDERS)
def test_fastkv_sends_on_a_part_of_the_image(name: str) -> None:
    model, given = hosted(name), inputs(name, images=4)
    total = given["input_ids"].shape[1]
    cache = cache_of(model, "fastkv(layer=0, share=0.5)", given)
    with torch.no_grad(), cache.watching(model):
        model(**given, past_key_values=cache)
    assert cache.held_tokens() == [[[n, n]] for n in (total, total // 2, total // 2)]


@pytest.mark.parametrize("recipe", ["vidkv_stp", "fastkv(layer=0, share=0.8) | vidkv_stp"])
@pytest.mark.parametrize("name", BUILDERS)
def test_vidkv_protects_image_tokens_alone(name: str, recipe: str) -> None:
    model, given = hosted(name), inputs(name, images=9)
    ids = given["input_ids"][0]
    cache = cache_of(model, recipe, given)
    with torch.no_grad(), cache.watching(model):
        model(**given, past_key_values=cache)
    for layer in cache.own_layers:
        heads = layer.content.rows[0].segments[0].heads
        for head, positions in zip(heads, layer.content.positions(0, len(ids)), strict=True):
            (chosen,) = unpack_kept(head.fine.chosen)
            assert len(chosen) == 64
            assert (ids[positions[chosen]] == IMAGE).all()


TEXT = 200
"""Tokens of a prompt for models that take no images."""
BLIND = ("llama", "gemma3")
"""Such models; the configuration of the second is that of a part of models that see."""


def read_text(name: str, recipe: str, *, told: bool, **options: Any) -> tuple[steno.KVCache, Tensor]:
    """What a model that takes no images keeps of a prompt, and its logits; told: whether it is given the ids."""
    model, ids = shared(name), prompt(TEXT)
    model.set_attn_implementation("steno")
    cache = steno.KVCache(model.config, recipe, input_ids=ids if told else None, **options)
    with torch.no_grad(), cache.watching(model):
        logits = model(ids, past_key_values=cache).logits
    return cache, logits


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(
    "recipe", ["text_prior @ 30%", "look_m @ 30%", "text_prior | adakv | vidkv_stp @ 70%", "vidkv_stp"]
)
@pytest.mark.parametrize("name", BLIND)
def test_a_model_that_takes_no_images_follows_the_recipe(name: str, recipe: str, told: bool) -> None:
    cache, _ = read_text(name, recipe, told=told)
    with torch.no_grad():
        for token in (5, 6, 7):
            assert shared(name)(torch.tensor([[token]]), past_key_values=cache).logits.isfinite().all()
    share = cache.recipe.budget.share if cache.recipe.budget else 1
    for layer in cache.held_tokens():
        assert sum(layer[0]) == len(layer[0]) * (round(share * TEXT) + 3)
    assert cache.kv_bytes < cache.kv_bytes_full
    cache.check_integrity()


@pytest.mark.parametrize("name", BLIND)
def test_without_images_text_prior_keeps_the_newest_and_the_most_attended(name: str) -> None:
    budget, recent = 60, 30
    seen, _ = read_text(name, "text_prior @ 60", told=False, prompt_tokens=TEXT + 1)
    kept, _ = read_text(name, "text_prior @ 60", told=False)
    for before, after in zip(seen.own_layers, kept.own_layers, strict=True):
        obs = before.observation()[1]
        assert not obs.image_mask.any()
        mass = obs.attention_mass.unflatten(0, (2, -1)).sum(1)[:, : TEXT - recent]
        best = mass.topk(budget - recent).indices.sort().values
        for chosen, positions in zip(best, after.content.positions(0, TEXT), strict=True):
            assert positions.tolist() == [*chosen.tolist(), *range(TEXT - recent, TEXT)]


@pytest.mark.parametrize("name", BLIND)
def test_without_images_vidkv_protects_nothing(name: str) -> None:
    (a, same), (b, logits) = (read_text(name, recipe, told=False) for recipe in ("vidkv_stp", "vidkv"))
    assert torch.equal(same, logits)
    for x, y in zip(a.own_layers, b.own_layers, strict=True):
        for one, other in zip(
            x.content.decode_row(0, torch.float32), y.content.decode_row(0, torch.float32), strict=True
        ):
            assert all(torch.equal(i, j) for i, j in zip(one, other, strict=True))
    assert a.kv_bytes == b.kv_bytes


def test_errors() -> None:
    model, given = hosted("llava"), inputs("llava")
    with pytest.raises(CacheError, match="hidden states"):
        generate(model, cache_of(model, "vidkv_stp", given), given)
    with pytest.raises(CacheError, match="input_ids"):
        generate(model, steno.KVCache(model.config, "text_prior @ 50%"), given)
    nameless = copy.deepcopy(model.config)
    nameless.image_token_id = None  # it sees, and does not say what
    with pytest.raises(ModelError, match="image_token_id"):
        steno.KVCache(nameless, "text_prior @ 50%", input_ids=given["input_ids"])
    with pytest.raises(CacheError, match="input_ids"):
        generate(model, steno.KVCache(nameless, "text_prior @ 50%"), given)
    with pytest.raises(CacheError, match="input_ids"):
        generate(model, steno.KVCache(model.config, "text_prior @ 50%").fork(), given)
    with pytest.raises(BadArgument, match="input_ids"):
        steno.KVCache(model.config, "text_prior @ 50%", input_ids=prompt(9)[0])
    with pytest.raises(CacheError, match="at least 42 tokens"):
        generate(model, steno.KVCache(model.config, "text_prior @ 50%", input_ids=given["input_ids"][:, :-1]), given)
    assert (
        Need.IMAGE_MASK not in steno.KVCache(model.config, "keydiff @ 50%", input_ids=given["input_ids"]).recipe.needs
    )
    model, given = hosted("qwen2_vl"), inputs("qwen2_vl")
    with pytest.raises(UnsupportedAttention, match="height and width"):
        generate(model, cache_of(model, "expected_attention @ 50%", given), given)
