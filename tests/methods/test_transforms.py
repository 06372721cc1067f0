"""Transforms: the invariants of their papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_layers import make_layer
from torch import Tensor
from transformers import LlamaConfig

import steno
from steno.cache.latent import LatentSegment, principal_directions, second_moment
from steno.cache.segment import DenseSegment
from steno.cache.transformed import TransformedSegment
from steno.calibration import save_calibration
from steno.errors import CalibrationError
from steno.kernels.attention import attend_heads
from steno.methods.transform.cskv import CSKV
from steno.methods.transform.hadamard import Hadamard, rotation
from steno.methods.transform.palu import Palu
from steno.methods.transform.rotatekv import RotateKV
from steno.methods.transform.think import ThinK
from steno.types import KeptTokens, Rope, Widths
from tiny import SHARED


def tokens_of(num_tokens: int, *, hkv: int = 2, dim: int = 16, **changes: Any) -> KeptTokens:
    kv, obs = make_layer(num_tokens, hkv=hkv, dim=dim, window=32)
    values: dict[str, Any] = {
        "keys": list(kv.keys), "values": list(kv.values), "positions": [kv.positions] * hkv, "layer_idx": 1, "num_layers": 4,
        "rope": obs.rope, "observation": obs,
    }  # fmt: skip
    return KeptTokens(**{**values, **changes})


def layer_with(
    recipe: str, num_tokens: int, *, hkv: int = 2, dim: int = 16, seed: int = 0
) -> tuple[Any, Tensor, Tensor]:
    """A layer that read a random prompt, and its keys and values `[Hkv, S, D]`."""
    config = LlamaConfig(**{**SHARED, "head_dim": dim, "num_attention_heads": 3 * hkv, "num_key_value_heads": hkv})
    layer = steno.KVCache(config, recipe).own_layers[1]
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, num_tokens, dim, generator=g) for heads in (3 * hkv, hkv, hkv))
    layer.update(k, v)
    layer.attend(q, None, scale=dim**-0.5)
    return layer, k[0], v[0]


# hadamard


@pytest.mark.parametrize("dim", [1, 2, 3, 12, 64, 80, 96, 112, 128])
def test_a_rotation_is_orthonormal_and_spreads_every_channel(dim: int) -> None:
    matrix = rotation(dim)
    assert torch.allclose(matrix @ matrix.T, torch.eye(dim), atol=1e-5)
    assert matrix.abs().max() <= (2 / dim) ** 0.5 + 1e-6
    if dim & (dim - 1) == 0:
        assert torch.allclose(matrix.abs(), torch.full((dim, dim), dim**-0.5))
        assert torch.allclose(matrix, matrix.T)


def test_a_rotation_saves_coarse_codes_from_an_outlier() -> None:
    errors = {}
    for recipe in ("int2", "hadamard | int2"):
        config = LlamaConfig(**{**SHARED, "head_dim": 64})
        layer = steno.KVCache(config, recipe).own_layers[0]
        g = torch.Generator().manual_seed(0)
        k, v = (torch.randn(1, 2, 256, 64, generator=g) for _ in range(2))
        v[..., 5] *= 50
        layer.update(k, v)
        layer.attend(torch.randn(1, 4, 256, 64, generator=g), None, scale=0.125)
        decoded = torch.stack([x for _, x in layer.content.decode_row(0, torch.float32)])
        others = torch.arange(64) != 5
        errors[recipe] = float((decoded - v[0])[..., others].square().mean() / v[0][..., others].square().mean())
    assert errors["hadamard | int2"] < errors["int2"] / 2


# rotatekv


@pytest.mark.parametrize("recipe", ["rotatekv", "rotatekv(sinks=0)", "rotatekv | int8", "keydiff | rotatekv @ 150"])
def test_rotatekv_answers_as_the_dense_cache(recipe: str) -> None:
    layer, keys, values = layer_with(recipe, 200, hkv=4)
    q = torch.randn(1, 12, 1, 16)
    new = torch.randn(2, 1, 4, 1, 16)
    layer.update(new[0], new[1])
    out = layer.attend(q, None, scale=0.25)
    positions = layer.content.positions(0, 201)
    heads = [
        (torch.cat([keys[h], new[0, 0, h]])[p], torch.cat([values[h], new[1, 0, h]])[p])
        for h, p in enumerate(positions)
    ]
    expected, _ = attend_heads(q[0], heads, scale=0.25)
    assert torch.allclose(out[0], expected, atol=0.03 if "int8" in recipe else 1e-4)


def test_rotatekv_leaves_the_first_tokens_whole() -> None:
    for recipe, count in (("rotatekv(sinks=4)", 4), ("keydiff | rotatekv(sinks=30) @ 150", None)):
        layer, keys, _ = layer_with(recipe, 200, hkv=4)
        first, second = layer.content.rows[0].segments
        assert isinstance(first, DenseSegment)
        assert isinstance(second, LatentSegment)
        where = layer.content.positions(0, 200)[0]
        assert len(first.decode(torch.float32)[0][0]) == (count or int((where < 30).sum()))
        assert torch.equal(first.decode(torch.float32)[1][0], keys[1, where[: first.lengths[0]]])


def test_rotatekv_orders_channels_by_their_mean_and_can_be_calibrated(tmp_path: Path) -> None:
    tokens = tokens_of(60, hkv=4)
    basis = RotateKV(heads=2).fit(tokens)
    assert basis.matrix.shape == (32, 32)
    latents = torch.cat(basis.change(tokens).keys, dim=1).mean(0)
    assert (latents.diff() > -1e-5).all()
    means = torch.stack([torch.cat([tokens.rope.undo(k, tokens.positions[0]).mean(0) for k in tokens.keys])] * 4)
    save_calibration(tmp_path / "means.safetensors", {"key_mean": means}, {})
    calibrated = RotateKV(heads=2, statistics=str(tmp_path / "means.safetensors"))
    assert torch.equal(calibrated.fit(tokens).order, basis.order)
    with pytest.raises(CalibrationError, match="calibrate on this model"):
        calibrated.fit(tokens_of(60, hkv=2))


def test_a_rotation_before_rope_does_not_commute_with_it() -> None:
    tokens = tokens_of(20, hkv=1)
    turned = rotation(16)
    before = tokens.rope.apply(tokens.keys[0] @ turned, tokens.positions[0])
    after = tokens.rope.apply(tokens.keys[0], tokens.positions[0]) @ turned
    assert not torch.allclose(before, after, atol=1e-2)


# think


def test_think_drops_unused_channels_first_and_without_loss() -> None:
    tokens = tokens_of(40)
    for h in range(2):
        tokens.keys[h][:, 3 * h : 3 * h + 3] = 0
    tokens.observation.queries[:3, :, 8:11] = 0
    basis = ThinK(ratio=6 / 16).fit(tokens)
    assert not set(basis.channels[0].tolist()) & {0, 1, 2, 8, 9, 10}
    assert not set(basis.channels[1].tolist()) & {3, 4, 5}
    q = tokens.observation.queries
    changed = basis.change(tokens)
    segment = basis.wrap(DenseSegment.of(list(zip(changed.keys, changed.values, strict=True))), tokens)
    lossless, _ = segment.attend(q, 0.25)
    expected, _ = attend_heads(q, list(zip(tokens.keys, tokens.values, strict=True)), scale=0.25)
    assert torch.allclose(lossless[:3], expected[:3], atol=1e-5)


def test_think_answers_as_keys_with_zeros_and_does_not_see_the_scale_of_a_head() -> None:
    tokens = tokens_of(40)
    basis = ThinK().fit(tokens)
    assert basis.channels.shape == (2, 16 - 6)
    masked = []
    for k, channels in zip(tokens.keys, basis.channels, strict=True):
        mask = torch.zeros(16).scatter(0, channels, 1.0)
        masked.append(k * mask)
    changed = basis.change(tokens)
    assert all(torch.equal(a, b) for a, b in zip(changed.values, tokens.values, strict=True))
    for h in range(2):
        assert torch.equal(basis.plain_keys(changed.keys[h][None], slice(h, h + 1))[0], masked[h])
    scaled = tokens_of(40, keys=[tokens.keys[0] * 7, tokens.keys[1]])
    assert torch.equal(ThinK().fit(scaled).channels, basis.channels)


@pytest.mark.parametrize("recipe", ["think(ratio=0.5, recent=20)", "think(ratio=0.5, recent=20) | int8"])
def test_think_leaves_the_newest_tokens_whole_and_frees_bytes(recipe: str) -> None:
    layer, keys, _ = layer_with(recipe, 500)
    [segment] = layer.content.rows[0].segments
    assert isinstance(segment, TransformedSegment)
    assert segment.lengths == (448, 448)
    assert torch.equal(layer.content.tail.row(0)[0], keys[:, 448:])
    if "int8" not in recipe:
        assert segment.inner.keys.numel() * 2 == segment.inner.values.numel() == 2 * 448 * 16
    full, _, _ = layer_with(recipe.replace("think(ratio=0.5, recent=20)", "full").replace("full | ", ""), 500)
    assert layer.measure() < full.measure()


@pytest.mark.parametrize(
    ("chain", "kept"),
    [("hadamard | think(ratio=0.5, recent=0)", 8), ("think(ratio=0.25, recent=0) | think(ratio=0.34, recent=0)", 8),
     ("think(ratio=0.25, recent=0) | hadamard | think(ratio=0.0, recent=0)", 12)],
)  # fmt: skip
@pytest.mark.parametrize("stored", ["", " | int8"])
def test_think_chooses_channels_by_queries_in_the_basis_before_it(chain: str, kept: int, stored: str) -> None:
    """Queries that use half of the channels, others in each KV head, lose nothing with the other half."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 200, 16, generator=g) for heads in (6, 2, 2))
    q[:, :3, :, ::2] = 0
    q[:, 3:, :, :8] = 0
    if chain.startswith("hadamard"):
        q = q @ rotation(16).mT  # channels of the rotated basis are unused
    config = LlamaConfig(**{**SHARED, "head_dim": 16, "num_attention_heads": 6, "num_key_value_heads": 2})
    outs = []
    for recipe in (chain + stored, "full"):
        layer = steno.KVCache(config, recipe).own_layers[1]
        layer.update(k, v)
        layer.attend(q, None, scale=0.25)
        if recipe != "full":
            [segment] = layer.content.rows[0].segments
            assert segment.lengths == (192, 192)
            assert segment.bases[-1].channels.shape == (2, kept)
        layer.update(k[:, :, :1], v[:, :, :1])
        outs.append(layer.attend(q[:, :, 5:6], None, scale=0.25))
    assert torch.allclose(*outs, atol=0.03 if stored else 1e-5)


# latents


def test_low_rank_is_the_whitened_svd_of_the_projection() -> None:
    """Palu truncates S^T W and CSKV trains A B; both end at W V V^T, with V the principal directions of x W."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(300, 20, generator=g).double(), torch.randn(20, 12, generator=g).double()
    x = x * torch.linspace(0.2, 3, 20)
    s = torch.linalg.cholesky(x.T @ x)
    u, sigma, vh = torch.linalg.svd(s.T @ w, full_matrices=False)
    rank = 5
    down, up = torch.linalg.inv(s.T) @ u[:, :rank] * sigma[:rank], vh[:rank]
    directions = principal_directions(second_moment([(x @ w).float()]), 1, rank)[0].double()
    ours = x @ w @ directions @ directions.T
    assert torch.allclose(x @ down @ up, ours, atol=1e-4)
    error = (x @ w - ours).square().sum()
    assert torch.allclose(error, sigma[rank:].square().sum(), rtol=1e-4)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_palu_groups_heads_and_keeps_the_rank(heads: int) -> None:
    tokens = tokens_of(100, hkv=4)
    basis = Palu(heads=heads, key_share=0.25, value_share=0.75).fit(tokens)
    assert basis.key_directions.shape == (4 // heads, heads * 16, heads * 4)
    assert basis.value_directions.shape == (4 // heads, heads * 16, heads * 12)
    changed = basis.change(tokens)
    assert [k.shape for k in changed.keys] == [(100, heads * 4)] * (4 // heads)
    error = [0.0, 0.0]
    for i, shares in enumerate(((0.25, 0.25), (0.75, 0.75))):
        basis = Palu(heads=heads, key_share=shares[0], value_share=shares[1]).fit(tokens)
        values = torch.stack(tokens.values)
        restored = basis.outputs(basis.latent_values(values).repeat_interleave(heads, 0))
        moment = second_moment(tokens.values).double()
        tail = 0.0
        for block in range(0, 64, heads * 16):
            eigen = torch.linalg.eigvalsh(moment[block : block + heads * 16, block : block + heads * 16])
            tail += float(eigen[: heads * 16 - basis.value_directions.shape[2]].sum())
        error[i] = float((restored - values).square().sum() / 100)
        assert error[i] == pytest.approx(tail, rel=1e-3)
    assert error[1] < error[0]


@pytest.mark.parametrize(
    "recipe", ["palu", "cskv(window=64)", "palu | hadamard", "palu | int8", "cskv | hadamard | int8"]
)
def test_latents_of_full_rank_answer_as_the_dense_cache(recipe: str) -> None:
    whole = {
        "palu": "palu(key_share=1.0, value_share=1.0)",
        "cskv": "cskv(key_density=1.0, value_density=1.0, window=64)",
    }
    name = recipe.split("|")[0].split("(")[0].strip()
    chain = recipe.replace("(window=64)", "").replace(name, whole[name])
    ours, _, _ = layer_with(chain, 200)
    dense, _, _ = layer_with("full", 200)
    assert any(isinstance(s, LatentSegment) for s in ours.content.rows[0].segments)
    for i, count in enumerate([1, 3, *[1] * 64, 70, 1]):
        g = torch.Generator().manual_seed(10 + i)
        q, k, v = (torch.randn(1, heads, count, 16, generator=g) for heads in (6, 2, 2))
        outs = []
        for layer in (ours, dense):
            layer.update(k, v)
            outs.append(layer.attend(q, None, scale=0.25))
        assert torch.allclose(*outs, atol=0.05 if "int8" in recipe else 1e-4)
    assert ours.held_tokens() == dense.held_tokens()


def test_many_tiles_answer_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _, _ = layer_with("palu | int8", 400)
    [segment] = layer.content.rows[0].segments
    q = torch.randn(6, 3, 16)
    one = segment.attend(q, 0.25)
    monkeypatch.setattr("steno.cache.latent.TILE_TOKENS", 128)
    many = segment.attend(q, 0.25)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("transform", ["palu", "cskv", "palu | int8"])
@pytest.mark.parametrize("chooser", ["keydiff", "snapkv(window=8) | pyramidkv"])
def test_heads_that_are_kept_together_choose_together(chooser: str, transform: str) -> None:
    layer, keys, _ = layer_with(f"{chooser} | {transform} @ 140", 200)
    first, *others = layer.content.positions(0, 200)
    assert all(torch.equal(first, other) for other in others)
    assert len(first) <= 140 if "pyramidkv" not in chooser else True
    q = torch.randn(6, 1, 16)
    segment = layer.content.rows[0].segments[0]
    expected = attend_heads(q, segment.decode(torch.float32), scale=0.25)
    found, tolerance = segment.attend(q, 0.25), 5e-3 if "int8" in transform else 1e-4  # packed products round
    assert all(torch.allclose(a, b, atol=tolerance) for a, b in zip(found, expected, strict=True))
    cosine = torch.cosine_similarity(segment.decode(torch.float32)[0][0], keys[0, segment.positions.long()])
    assert cosine.mean() > 0.5  # the right tokens, rotated at their own positions


def test_cskv_keeps_the_window_whole() -> None:
    layer, keys, values = layer_with("cskv(window=32)", 31)
    assert not layer.content.rows[0].segments
    assert torch.equal(layer.content.tail.row(0)[0], keys)
    layer, keys, values = layer_with("cskv(window=32)", 90)
    assert layer.content.rows[0].lengths(2) == [64, 64]
    assert torch.equal(layer.content.tail.row(0)[1], values[:, 64:])


def moments_file(folder: Path, num_layers: int = 3, width: int = 32) -> str:
    g = torch.Generator().manual_seed(5)
    root = torch.randn(2, num_layers, width, width, generator=g)
    moments = root @ root.mT
    save_calibration(folder / "moments.safetensors", {"key_moment": moments[0], "value_moment": moments[1]}, {})
    return str(folder / "moments.safetensors")


@pytest.mark.parametrize("name", ["palu", "cskv"])
def test_a_calibrated_basis_is_one_for_all_sequences(tmp_path: Path, name: str) -> None:
    recipe = f"{name}(statistics={moments_file(tmp_path)!r})"
    one, _, _ = layer_with(recipe, 128, seed=0)
    other, _, _ = layer_with(recipe, 192, seed=1)
    assert one.content.rows[0].bases[0] is other.content.rows[0].bases[0]
    # whether tokens came in the prompt or later, they are stored as the same latents
    _, keys, values = layer_with(recipe, 192, seed=1)
    config = LlamaConfig(**{**SHARED, "head_dim": 16, "num_attention_heads": 6})
    stepped = steno.KVCache(config, recipe).own_layers[1]
    for part in range(0, 192, 64):
        stepped.update(keys[None, :, part : part + 64], values[None, :, part : part + 64])
        stepped.attend(torch.zeros(1, 6, 64, 16), None, scale=0.25)
    stepped.content.flush()
    rows = (layer.content.decode_row(0, torch.float32) for layer in (stepped, other))
    for (a, b), (c, d) in zip(*rows, strict=True):
        assert torch.allclose(a, c, atol=1e-4)
        assert torch.allclose(b, d, atol=1e-4)


def test_moments_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"must be those of this model, \[3, 32, 32\]; got \[3, 24, 24\]"):
        layer_with(f"palu(statistics={moments_file(tmp_path, width=24)!r})", 128)


def test_rope_applies_what_undo_takes_back() -> None:
    rope = Rope(inv_freq=torch.tensor([1.0, 0.1, 0.01]), attention_scaling=1.3)
    x, positions = torch.randn(2, 5, 8), torch.tensor([0, 3, 4, 9, 1000])
    assert torch.allclose(rope.undo(rope.apply(x, positions), positions), x, atol=1e-5)
    assert torch.equal(rope.apply(x, positions)[..., 6:], x[..., 6:])
    assert torch.allclose(rope.apply(x, positions)[:, 0, :6], 1.3 * x[:, 0, :6])


def test_bytes_are_those_of_the_formula() -> None:
    layer, _, _ = layer_with("palu(key_share=0.25, value_share=0.5)", 640)
    [segment] = layer.content.rows[0].segments
    assert segment.inner.keys.shape == (640, 8)
    assert segment.inner.values.shape == (640, 16)
    held = sum(x.numel() * x.element_size() for x in (segment.inner.keys, segment.inner.values))
    assert held == 640 * (8 + 16) * 4
    assert layer.measure() < 0.55 * layer_with("full", 640)[0].measure()
    widths = Widths(heads=2, keys=16, values=16)
    assert CSKV().basis_bytes(widths, 1, 4) == 32 * (16 + 16) * 4 + 32
    assert Hadamard().basis_bytes(widths, 1, 2) == 16 * 16 * 4
