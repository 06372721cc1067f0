"""GGUF files: converted once into a folder that transformers loads fast.

The weights are dequantized and the metadata is read by transformers; this file repairs what that reading loses.
"""

from __future__ import annotations

import errno
import hashlib
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from steno.errors import ModelError
from steno.models.folder_cache import Notify, ensure_folder
from steno.models.quiet import quiet_transformers


def gguf_folder(path: Path, *, cache_dir: Path, notify: Notify) -> Path:
    """Return the converted form of the GGUF file `path`, kept in `cache_dir` by its path, size and time of change."""
    stat = path.stat()
    identity = f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
    target = cache_dir / "gguf" / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    def build(folder: Path) -> None:
        notify(f"converting {path.name} into {target}, once")
        convert_gguf(path, folder)

    # a bf16 copy of 4-bit weights is about four times as large
    return ensure_folder(target, build, need_bytes=4 * stat.st_size, notify=notify)


def convert_gguf(path: Path, folder: Path) -> None:
    """Write config, generation config, tokenizer and dense safetensors weights of a GGUF file into `folder`.

    Quantized weights become bfloat16; a file that is float16 or float32 throughout keeps its dtype.

    Raises
    ------
    ModelError
        The file is damaged, or of an architecture that transformers cannot read from GGUF.
    """
    try:
        # the reader draws its progress bar past transformers' switch for it
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            _convert(path, folder)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # from the system; transformers raises it without errno
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"cannot convert {path}: {reason}; give a whole GGUF file of a model that transformers knows."
        ) from error


def _convert(path: Path, folder: Path) -> None:
    reader = GGUFReader(path)
    dtype = _dense_dtype(reader)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.dtype = dtype
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    parsed = load_gguf_checkpoint(path, return_tensors=True, model_to_load=skeleton, torch_dtype=dtype)
    weights = {name: tensor.contiguous() for name, tensor in parsed["tensors"].items()}
    missing = set(skeleton.state_dict()) - set(weights) - set(skeleton.all_tied_weights_keys)
    if missing:
        raise ModelError(
            f"cannot convert {path}: it lacks {len(missing)} weights, such as {min(missing)!r}; get it again."
        )
    _repair_config(config, type(skeleton).__name__)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    _repair_tokenizer(tokenizer, config, reader)
    config.save_pretrained(folder)
    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # the only writer here that does not raise OSError
        full = "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error


def _dense_dtype(reader: GGUFReader) -> torch.dtype:
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    if kinds == {"F32"}:
        return torch.float32
    return torch.float16 if kinds <= {"F16", "F32"} else torch.bfloat16


def _repair_config(config: PreTrainedConfig, architecture: str) -> None:
    config.architectures = [architecture]
    config.__dict__.pop("_model_name_or_path", None)
    for key, value in config.to_dict().items():
        if isinstance(value, float):  # GGUF keeps float32: 1e-05 comes back as 9.999999747378752e-06
            setattr(config, key, float(f"{value:.7g}"))


def _repair_tokenizer(tokenizer: Any, config: PreTrainedConfig, reader: GGUFReader) -> None:
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    kind = reader.get_field("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":
        # transformers drops the digit splitter, so spaces before a number are cut otherwise than in training
        rest = tokenizer.backend_tokenizer.pre_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
