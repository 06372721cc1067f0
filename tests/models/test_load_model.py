"""Where a model comes from, how it is loaded, and what is said when it cannot be."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.utils import logging

from steno.errors import BadArgument, ModelError
from steno.models import load
from steno.models.load import default_dtype, load_model


def test_folder(tiny_folder, tiny_model, capsys):
    loaded = load_model(tiny_folder)
    assert loaded.name == "tiny-llama"
    assert loaded.source == str(tiny_folder)
    assert loaded.max_positions == 128
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.tokenizer.eos_token_id == 2
    ids = loaded.tokenizer("he said 1", return_tensors="pt").input_ids
    with torch.inference_mode():
        found, expected = loaded.model(ids).logits.float(), tiny_model(ids).logits
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("fp32", torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)],
)
def test_dtype_is_obeyed(tiny_folder, dtype, expected):
    assert load_model(tiny_folder, dtype=dtype).model.dtype == expected


@pytest.mark.parametrize(
    ("checkpoint", "device", "native", "expected"),
    [
        (torch.bfloat16, "cpu", False, torch.float32),
        (torch.float16, "cpu", False, torch.float32),
        (torch.bfloat16, "cpu", True, torch.bfloat16),
        (torch.float16, "cpu", True, torch.bfloat16),
        (torch.float32, "cpu", True, torch.float32),
        (None, "cpu", True, torch.float32),
        (torch.float16, "cuda", False, torch.bfloat16),
    ],
)
def test_default_dtype(monkeypatch, checkpoint, device, native, expected):
    monkeypatch.setattr(load, "cpu_has_bfloat16", lambda: native)
    config = LlamaConfig()
    config.dtype = checkpoint
    assert default_dtype(config, torch.device(device)) == expected


def test_hash_names_the_weights_not_the_way_they_were_loaded(tiny_folder, tmp_path):
    first = load_model(tiny_folder, dtype="fp32")
    copy = shutil.copytree(tiny_folder, tmp_path / "elsewhere")
    assert load_model(copy, dtype="bf16").model_hash == first.model_hash
    assert len(first.model_hash) == 16
    with torch.no_grad():
        first.model.model.layers[1].mlp.up_proj.weight.mul_(2)
    first.model.save_pretrained(copy)
    assert load_model(copy).model_hash != first.model_hash
    config = copy / "config.json"
    changed = load_model(copy).model_hash
    config.write_text(config.read_text().replace('"rope_theta": 1000.0', '"rope_theta": 2000.0'))
    assert load_model(copy).model_hash != changed


def test_transformers_is_as_loud_as_before(tiny_folder):
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    logging.set_verbosity_info()
    try:
        load_model(tiny_folder)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, before[1])
    finally:
        logging.set_verbosity(before[0])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("smolm2-135m", "unknown model 'smolm2-135m'; did you mean 'smollm2-135m'?"),
        ("", "unknown model ''"),
        ("gpt2", "a Hugging Face id `org/name` can be given too"),
        ("./nowhere", "no such file or folder: nowhere"),
        ("/nowhere/at/all", "no such file or folder: /nowhere/at/all"),
        ("nowhere.gguf", "no such file or folder: nowhere.gguf"),
        ("org/nowhere.gguf", "no such file or folder"),
        (Path("smollm2-135m"), "no such file or folder"),
        (Path("org/name"), "no such file or folder"),
    ],
)
def test_source_that_does_not_exist(monkeypatch, tmp_path, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_model(source, cache_dir=tmp_path / "cache")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_without_config(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json; give a folder that `save_pretrained` wrote"):
        load_model(tmp_path)


def test_file_of_another_kind(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"must end in \.gguf; got .*model\.bin"):
        load_model(tmp_path / "model.bin")


@pytest.mark.parametrize("damage", ["truncated weights", "no weights", "config is no json", "unknown architecture"])
def test_damaged_folder(tiny_folder, tmp_path, damage):
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    if damage == "truncated weights":
        os.truncate(copy / "model.safetensors", 1000)
    elif damage == "no weights":
        (copy / "model.safetensors").unlink()
    elif damage == "config is no json":
        (copy / "config.json").write_text("{")
    else:
        (copy / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(ModelError, match=r"cannot load .*copy: .*; give the whole folder") as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_are_not_made_up(tiny_folder, tmp_path):
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"copy lacks weights, such as 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_model(copy)


def test_hub_id_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    notices: list[str] = []
    with pytest.raises(ModelError, match="not in the local cache and the hub cannot be reached") as caught:
        load_model("no-such-org/no-such-model", cache_dir=tmp_path, notify=notices.append)
    assert "\n" not in str(caught.value)
    assert notices == ["looking for no-such-org/no-such-model in the Hugging Face cache and on the hub"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "fp8"}, "got dtype='fp8'; did you mean 'fp32'"),
        ({"dtype": torch.int8}, "got dtype=torch.int8"),
        ({"device": "tpu9000"}, "got device='tpu9000'"),
    ],
)
def test_wrong_arguments(tiny_folder, arguments, message):
    with pytest.raises(BadArgument) as caught:
        load_model(tiny_folder, **arguments)
    assert message in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_where_there_is_none(tiny_folder):
    with pytest.raises(BadArgument, match="without CUDA; use `cpu`"):
        load_model(tiny_folder, device="cuda")
