"""Mixture of depths on the image tokens of tiny vision-language models, with a seeded router."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import steno
from steno.errors import CalibrationError
from steno.models.host import is_attention
from tiny import SHARED, prompt, shared
from tiny_vlm import AFTER, BEFORE, BUILDERS, IMAGE, IMAGE_TOKENS, inputs, vlm

HIDDEN, LAYERS = SHARED["hidden_size"], 3


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("router") / "router.safetensors"
    weights = 0.02 * torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(2))  # no gate is 0 or 1
    save_file({"router": weights}, path)
    return str(path)


def hosted(name: str) -> Any:
    model = vlm(name)
    model.set_attn_implementation("steno")
    return model


def read(name: str, recipe: str, given: dict[str, Tensor]) -> tuple[steno.KVCache, Tensor, dict[int, Any]]:
    """The cache, the logits, and what went into and came out of each decoder layer, seen from outside of our hooks."""
    model, seen = hosted(name), {}
    blocks = [(m, c.layer_idx) for m in model.modules() for c in m.children() if is_attention(c)]
    cache = steno.KVCache(model.config, recipe, input_ids=given["input_ids"])

    def before(idx: int) -> Any:
        return lambda m, args, kwargs: seen.__setitem__(idx, [args[0]])

    def after(idx: int) -> Any:
        return lambda m, args, out: seen[idx].append(out)

    hooks = [m.register_forward_pre_hook(before(i), with_kwargs=True) for m, i in blocks]
    with torch.no_grad(), cache.watching(model):
        hooks += [m.register_forward_hook(after(i)) for m, i in blocks]
        logits = model(**given, past_key_values=cache).logits
    for hook in hooks:
        hook.remove()
    cache.check_integrity()
    return cache, logits, seen


@pytest.mark.parametrize("name", BUILDERS)
def test_a_share_of_one_without_a_gate_is_the_identity(name: str, router: str) -> None:
    given = inputs(name, images=2)
    cache, logits, _ = read(name, f"videollm_mod(router={router!r}, share=1, gate='none')", given)
    full, plain, _ = read(name, "full", given)
    assert torch.equal(logits, plain)
    assert cache.kv_bytes == full.kv_bytes


@pytest.mark.parametrize("name", BUILDERS)
def test_text_alone_is_untouched(name: str, router: str) -> None:
    ids = inputs(name)["input_ids"]
    given = {"input_ids": ids[:, :BEFORE].repeat(1, 4)}
    _, logits, _ = read(name, f"videollm_mod(router={router!r}, every=1)", given)
    _, plain, _ = read(name, "full", given)
    assert torch.equal(logits, plain)


@pytest.mark.parametrize("given", [None, prompt(40)])
def test_a_model_that_takes_no_images_is_untouched(given: Tensor | None, router: str) -> None:
    model = shared("llama")
    model.set_attn_implementation("steno")
    found = []
    for recipe in (f"videollm_mod(router={router!r}, every=1)", "full"):
        cache = steno.KVCache(model.config, recipe, input_ids=given)
        with torch.no_grad(), cache.watching(model):
            found.append((model(prompt(40), past_key_values=cache).logits, cache.kv_bytes))
    (logits, held), (plain, full) = found
    assert torch.equal(logits, plain)
    assert held == full
    cache = steno.KVCache(model.config, "videollm_mod", input_ids=given)
    with pytest.raises(CalibrationError, match=r"videollm_mod\(router='FILE'\)"), cache.watching(model):
        model(prompt(40), past_key_values=cache)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("name", BUILDERS)
def test_each_frame_sends_its_share_through_routed_layers(name: str, every: int, share: float, router: str) -> None:
    given = inputs(name, images=3)
    ids = given["input_ids"][0]
    is_image = ids == IMAGE
    recipe = f"videollm_mod(router={router!r}, share={share}, every={every})"
    cache, _, seen = read(name, recipe, given)
    text = BEFORE + AFTER + 6
    per_frame = math.ceil(share * IMAGE_TOKENS)
    for idx, layer in enumerate(cache.own_layers):
        [positions, other] = layer.content.positions(0, len(ids))
        assert torch.equal(positions, other)
        routed = idx % every == every - 1
        assert len(positions) == (text + 3 * per_frame if routed else len(ids))
        came, went = seen[idx]
        round_it = torch.ones(len(ids), dtype=torch.bool)
        round_it[positions] = False
        assert torch.equal(came[0, round_it], went[0, round_it])  # as they came, to the bit
        assert not (came[0, ~round_it] == went[0, ~round_it]).all(1).any()
        assert is_image[round_it].all()
        if routed and per_frame:
            ranks = came[0] @ steno.calibration.load_calibration(router, ("router",))["router"][idx]
            for frame in range(3):
                of_frame = torch.arange(IMAGE_TOKENS) + BEFORE + 1 + frame * (IMAGE_TOKENS + 2)
                inside = ranks[of_frame[~round_it[of_frame]]]
                assert len(inside) == per_frame
                assert inside.min() > ranks[of_frame[round_it[of_frame]]].max()
    if share < 0.5:
        assert cache.kv_bytes < cache.kv_bytes_full


def test_the_gate_scales_what_a_layer_adds(router: str) -> None:
    given = inputs("llava")
    is_image = given["input_ids"][0] == IMAGE
    _, _, gated = read("llava", f"videollm_mod(router={router!r}, share=1, every=3)", given)
    _, _, plain = read("llava", "full", given)
    came, went = gated[2]
    added = (plain[2][1] - plain[2][0])[0]
    assert torch.equal(came, plain[2][0])
    ranks = came[0] @ steno.calibration.load_calibration(router, ("router",))["router"][2]
    assert torch.allclose((went - came)[0, is_image], added[is_image] * ranks.sigmoid()[is_image, None], atol=1e-5)
    assert torch.allclose(went[0, ~is_image], plain[2][1][0, ~is_image], atol=1e-6)


def test_frame_by_frame_is_what_one_pass_gives(router: str) -> None:
    """A stream of frames, each with the text behind it, into one prompt."""
    model, given = hosted("llava"), inputs("llava", images=4)
    ids = given["input_ids"]
    recipe = f"videollm_mod(router={router!r}) | int8"
    with torch.no_grad():
        features = model.get_image_features(pixel_values=given["pixel_values"]).pooler_output
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == IMAGE] = torch.cat(list(features))
        whole = steno.KVCache(model.config, recipe, input_ids=ids)
        with whole.watching(model):
            expected = model(inputs_embeds=embeds, past_key_values=whole).logits
        stream, parts = steno.KVCache(model.config, recipe, input_ids=ids, prompt_tokens=ids.shape[1]), []
        step = IMAGE_TOKENS + 2
        borders = [0, *(BEFORE + i * step for i in range(1, 5)), ids.shape[1]]
        with stream.watching(model):
            for a, b in zip(borders, borders[1:], strict=False):
                parts.append(model(inputs_embeds=embeds[:, a:b], past_key_values=stream).logits)
    assert torch.allclose(torch.cat(parts, dim=1), expected, atol=2e-4, rtol=2e-4)
    assert stream.held_tokens() == whole.held_tokens()
    for a, b in zip(stream.own_layers, whole.own_layers, strict=True):
        assert torch.equal(a.content.positions(0, 96)[0], b.content.positions(0, 96)[0])


def test_frames_without_text_between_are_told_by_their_length(router: str) -> None:
    method = steno.recipe.as_recipe(f"videollm_mod(router={router!r}, frame_tokens=5, every=1)").propagate
    mask = torch.zeros(20, dtype=torch.bool)
    mask[3:15] = True
    route = method.before(torch.randn(20, HIDDEN), mask, layer_idx=0, num_layers=LAYERS)
    held = [int(torch.isin(route.index, torch.arange(a, b)).sum()) for a, b in ((3, 8), (8, 13), (13, 15))]
    assert held == [1, 1, 1]


def test_a_router_is_asked_for_and_must_fit(tmp_path: Path) -> None:
    given = inputs("llava")
    with pytest.raises(CalibrationError, match=r"videollm_mod\(router='FILE'\)"):
        read("llava", "videollm_mod", given)
    save_file({"router": torch.randn(LAYERS, 7)}, tmp_path / "narrow")
    with pytest.raises(CalibrationError, match=r"\[3, 48\]; got \[3, 7\]"):
        read("llava", f"videollm_mod(router={str(tmp_path / 'narrow')!r})", given)
