"""Weights in fewer bits: near the dense layer, per token and per shape; what cannot be done is said."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import steno
from steno.errors import BadArgument, ModelError
from steno.models import weights
from steno.models.embedded import DEFAULT_MODEL
from steno.models.folder_cache import default_cache_dir, is_complete
from steno.models.load import load_model
from steno.models.weights import (
    FORMATS,
    Bf16Linear,
    Fp16Linear,
    Int4Linear,
    Int8Linear,
    Int8WeightLinear,
    check_weights,
    cpu_has_bfloat16,
    has_vnni,
    shrink_weights,
)
from tiny import build, prompt

pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="this build of torch has no FBGEMM"
)
# relative error of a product of Gaussian numbers: rounding of the weights, and for int8 of the activations too
ERRORS = {Bf16Linear: 0.01, Fp16Linear: 1e-3, Int8Linear: 0.025, Int8WeightLinear: 0.025, Int4Linear: 0.15}
CPU = torch.device("cpu")
needs_bfloat16 = pytest.mark.skipif(not cpu_has_bfloat16(), reason="this CPU does not multiply bfloat16")
FORMATS_HERE = [name for name in FORMATS if name != "bf16" or cpu_has_bfloat16()]
IS_HERE = {Bf16Linear: cpu_has_bfloat16(), Int8Linear: has_vnni(), Int8WeightLinear: not has_vnni()}
LAYERS_HERE = [kind for kind in ERRORS if IS_HERE.get(kind, True)]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest of all tokens."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)).max())


def a_layer(num_in: int, num_out: int, bias: bool, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(num_in, num_out, bias=bias).requires_grad_(False)
    layer.weight.normal_(0, num_in**-0.5)
    return layer


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(LAYERS_HERE),
    groups=st.integers(1, 6),
    blocks=st.integers(1, 8),
    rows=st.sampled_from([*range(1, 10), 40]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@torch.inference_mode()
def test_every_token_is_near(kind: type[nn.Module], groups: int, blocks: int, rows: int, bias: bool, seed: int) -> None:
    num_in = 32 * groups + (0 if kind is Int4Linear else 5)
    num_out = 16 * blocks + (0 if kind is Int4Linear else 3)
    layer = a_layer(num_in, num_out, bias, seed)
    x = torch.randn(2, rows, num_in)
    x[0, 0] *= 1000  # a token with large activations must not make the others coarse
    before, product = x.clone(), layer(x)
    allowed = ERRORS[kind] * (1 if num_out >= 64 else 2)  # a norm over few outputs varies more
    assert relative_error(kind(layer)(x), product) < allowed
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", LAYERS_HERE)
@torch.inference_mode()
def test_a_token_does_not_depend_on_its_neighbours(kind: type[nn.Module]) -> None:
    layer, x = kind(a_layer(64, 48, True)), torch.randn(3, 64)
    together = layer(torch.cat([x, 1e4 * torch.randn(2, 64)]))[:3]
    assert relative_error(together, layer(x)) < 1e-3


@pytest.mark.parametrize("kind", LAYERS_HERE)
@torch.inference_mode()
def test_constant_tokens_and_empty_rows_of_weights(kind: type[nn.Module]) -> None:
    layer = a_layer(64, 32, True)
    layer.weight[3] = 0
    x = torch.stack([torch.zeros(64), torch.full((64,), 2.0), torch.full((64,), -1e-20)])
    found, expected = kind(layer)(x), layer(x)
    assert found.isfinite().all()
    assert (found - expected).abs().max() < 0.2 * expected.abs().max()
    assert torch.allclose(found[0], layer.bias, atol=1e-6)
    assert torch.allclose(found[:, 3], layer.bias[3].expand(3), atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS_HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_the_dtype_of_the_activations_stays(kind: type[nn.Module], dtype: torch.dtype) -> None:
    dense = a_layer(64, 32, True).to(dtype)
    x = torch.randn(1, 5, 64).to(dtype)
    out = kind(dense)(x)
    assert out.dtype == dtype
    assert out.shape == (1, 5, 32)
    assert relative_error(out.float(), dense(x).float()) < ERRORS[kind] + 0.02


@pytest.mark.parametrize(("has", "kind"), [(True, Int8Linear), (False, Int8WeightLinear)])
def test_activations_are_bytes_where_products_of_bytes_cannot_overflow(
    has: bool, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "has_vnni", lambda: has)
    model = build("llama")
    shrink_weights(model, "int8")
    assert type(model.lm_head) is kind


@needs_bfloat16
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
@torch.inference_mode()
def test_bf16_of_a_model_in_bfloat16_is_the_same_to_the_bit(name: str) -> None:
    model, ids = build(name).bfloat16(), prompt(40, rows=2)
    expected = model(ids).logits
    shrink_weights(model, "bf16")
    assert any(isinstance(module, Bf16Linear) for module in model.modules())
    assert torch.equal(model(ids).logits, expected)


def test_bf16_where_nothing_multiplies_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "cpu_has_bfloat16", lambda: False)
    with pytest.raises(BadArgument, match="multiplies bfloat16"):
        check_weights("bf16", CPU)


def test_a_weight_beyond_float16_is_refused() -> None:
    layer = a_layer(8, 8, False)
    layer.weight[0, 0] = 1e5
    with pytest.raises(ModelError, match="65504"):
        Fp16Linear(layer)


def test_int8_leaves_the_engine_and_the_filters_of_warnings_alone() -> None:
    engine = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Int8Linear(a_layer(32, 32, False))
    assert torch.backends.quantized.engine == engine


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "mixtral"])
@pytest.mark.parametrize("kind", FORMATS_HERE)
@torch.inference_mode()
def test_models_answer_alike(name: str, kind: str) -> None:
    """Untied heads, biases (Qwen 2), fused matrices (Phi-3), experts that are no linear layers (Mixtral)."""
    model, ids = build(name), prompt(40, rows=2)
    expected = model(ids).logits.log_softmax(-1)
    shrink_weights(model, kind)
    found = model(ids).logits.log_softmax(-1)
    assert not any(type(module) is nn.Linear for module in model.modules())
    divergence = (expected.exp() * (expected - found)).sum(-1)
    # weights as large as those of `tiny` disagree far more than trained ones; 16 bits still do not
    assert divergence.mean() < {"bf16": 5e-3, "fp16": 1e-4, "int8": 0.05, "int4": 1.0}[kind]
    assert divergence.mean() > 0


@torch.inference_mode()
def test_int4_takes_int8_for_the_head_and_for_odd_shapes() -> None:
    model = build("llama", hidden_size=80, head_dim=80)  # 80 inputs are no whole groups
    shrink_weights(model, "int4")
    layer = model.model.layers[0]
    assert isinstance(layer.mlp.down_proj, Int4Linear)  # 64 inputs, 80 outputs
    assert isinstance(layer.mlp.up_proj, (Int8Linear, Int8WeightLinear))
    assert isinstance(model.lm_head, (Int8Linear, Int8WeightLinear))
    assert model(prompt(9)).logits.isfinite().all()


@pytest.mark.parametrize("kind", FORMATS_HERE)
def test_load_and_decode(tiny_folder: Path, kind: str) -> None:
    plain, lm = steno.load(tiny_folder), steno.load(tiny_folder, weights=kind)
    assert lm.loaded.weights == kind
    assert plain.loaded.weights is None
    assert lm.loaded.model_hash == plain.loaded.model_hash  # a calibration is for the checkpoint, whatever the format
    assert lm.model.model.embed_tokens.weight.dtype == lm.model.dtype
    context = lm.read("the hen is here. " * 4, "int8")
    steps = list(context.ask("he?", max_new_tokens=4, keep_logprobs=True))
    assert sum(len(step.token_ids) for step in steps) <= 4
    assert all(step.logprobs.isfinite().all() for step in steps if step.logprobs is not None)


def test_nothing_is_written(tiny_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_folder, tmp_path / "model")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    load_model(copy, weights="int4", cache_dir=tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_unknown_formats_and_devices_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(BadArgument, match="did you mean 'int8'"):
        load_model("no-such-model", weights="int88")
    with pytest.raises(BadArgument, match="CPU only"):
        check_weights("int8", torch.device("cuda"))


def test_a_torch_without_fbgemm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Quantized:
        supported_engines = ("none", "qnnpack")

    monkeypatch.setattr(torch.backends, "quantized", Quantized)
    check_weights(None, CPU)
    with pytest.raises(BadArgument, match="FBGEMM"):
        check_weights("int4", CPU)


@pytest.fixture(scope="module")
def expected() -> tuple[torch.Tensor, torch.Tensor]:
    """512 tokens of prose, and what the embedded model makes of them: logarithms of probabilities `[512, V]`."""
    from pydoc_data.topics import topics

    lm = steno.load(dtype="fp32")  # in bfloat16 the rounding of what is computed hides that of the weights
    ids = torch.tensor([lm.tokenize("\n\n".join(topics[name] for name in sorted(topics))[:4000])[:512]])
    assert ids.shape[1] == 512
    with torch.inference_mode():
        return ids, lm.model(ids, use_cache=False).logits[0].log_softmax(-1)


@pytest.mark.model
@pytest.mark.skipif(not is_complete(default_cache_dir() / DEFAULT_MODEL), reason="`make model` fetches the model")
@pytest.mark.parametrize(("kind", "kl", "top1"), [("fp16", 1e-4, 0.98), ("int8", 0.04, 0.85), ("int4", 0.03, 0.88)])
@torch.inference_mode()
def test_the_embedded_model_loses_little(
    kind: str, kl: float, top1: float, expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    lm, (ids, whole) = steno.load(dtype="fp32"), expected
    shrink_weights(lm.model, kind)
    found = lm.model(ids, use_cache=False).logits[0].log_softmax(-1)
    assert (whole.exp() * (whole - found)).sum(-1).mean() < kl
    assert (whole.argmax(-1) == found.argmax(-1)).float().mean() > top1
