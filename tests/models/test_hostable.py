"""Architectures that steno can and cannot host are told apart before a token is read."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from steno.errors import UnsupportedAttention
from steno.models.load import check_hostable, load_model
from steno.models.quiet import quiet_transformers

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def build(architecture: str, **sizes):
    config = getattr(transformers, f"{architecture}Config")(**sizes)
    with torch.device("meta"), quiet_transformers():
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3", "Mistral", "Gemma2", "Phi3", "GPTNeoX"])
def test_hostable(architecture):
    check_hostable(build(architecture, **SIZES, **HEADS))


@pytest.mark.parametrize(
    ("architecture", "sizes", "reason"),
    [
        ("Bert", SIZES | HEADS, r"BertLMHeadModel \(bert\) is not a causal language model"),
        ("Mamba", SIZES, r"\(mamba\) keeps a recurrent state"),
        ("Bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 2}, "attention registry"),
    ],
)
def test_not_hostable(architecture, sizes, reason):
    with pytest.raises(UnsupportedAttention, match=f"{reason}.*; give a decoder-only model"):
        check_hostable(build(architecture, **sizes))


def test_encoder_decoder():
    with torch.device("meta"):
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        )
    with pytest.raises(UnsupportedAttention, match="is an encoder-decoder"):
        check_hostable(model)


def test_load_model_checks(tiny_folder, tmp_path):
    config = transformers.BertConfig(**SIZES, **HEADS)
    with quiet_transformers():
        transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    with pytest.raises(UnsupportedAttention, match="not a causal language model"):
        load_model(tmp_path)
