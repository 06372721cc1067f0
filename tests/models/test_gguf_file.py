"""A GGUF file loads as the model that was written into it."""

from __future__ import annotations

import pytest
import torch

from steno.errors import ModelError
from steno.models.load import load_model


def logits(model):
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        return model(ids).logits


def test_float32_file_gives_the_same_logits(tiny_gguf, tiny_model, tmp_path, capsys):
    notices: list[str] = []
    loaded = load_model(tiny_gguf, cache_dir=tmp_path, notify=notices.append)
    torch.testing.assert_close(logits(loaded.model), logits(tiny_model), atol=1e-5, rtol=1e-5)
    assert loaded.name == "tiny"
    assert loaded.max_positions == 128
    assert loaded.model.config.rms_norm_eps == 1e-5
    assert [line.split()[0] for line in notices] == ["converting"]
    load_model(str(tiny_gguf), cache_dir=tmp_path, notify=notices.append)
    assert len(notices) == 1
    assert capsys.readouterr().err == ""


def test_quantized_file_becomes_bfloat16(write_gguf, tiny_model, tmp_path):
    path = tmp_path / "tiny.Q8_0.gguf"
    write_gguf(path, "Q8_0")
    loaded = load_model(path, cache_dir=tmp_path, dtype="bf16", notify=[].append)
    assert loaded.model.dtype == torch.bfloat16
    expected = logits(tiny_model)
    assert (logits(loaded.model).float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_changed_file_is_converted_again(write_gguf, tmp_path):
    path = tmp_path / "tiny.gguf"
    hashes = set()
    for kind in ("F32", "Q8_0"):
        path.unlink(missing_ok=True)
        write_gguf(path, kind)
        hashes.add(load_model(path, cache_dir=tmp_path, notify=[].append).model_hash)
    assert len(hashes) == 2


def test_tokenizer(tiny_gguf, tmp_path):
    tokenizer = load_model(tiny_gguf, cache_dir=tmp_path, notify=[].append).tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 128
    # "Ġ1" is in the vocabulary; the digit splitter of this family keeps the merge from happening
    assert tokenizer.tokenize("he  12") == ["he", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer("he  12 é\n").input_ids) == "he  12 é\n"
    assert tokenizer.apply_chat_template([{"content": "x"}], tokenize=False) == "<|im_start|>x<|im_end|>"


@pytest.mark.parametrize("damage", ["garbage", "empty", "half", "weights missing"])
def test_damaged_file(write_gguf, tmp_path, damage):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, without=("blk.1.ffn_up.weight",) if damage == "weights missing" else ())
    whole = path.read_bytes()
    contents = {"garbage": b"x" * 1000, "empty": b"", "half": whole[: len(whole) // 2]}
    path.write_bytes(contents.get(damage, whole))
    with pytest.raises(ModelError, match=r"cannot convert .*tiny\.gguf: ") as caught:
        load_model(path, cache_dir=tmp_path / "cache", notify=[].append)
    assert "\n" not in str(caught.value)
    assert {entry.suffix for entry in (tmp_path / "cache" / "gguf").iterdir()} <= {".lock"}
