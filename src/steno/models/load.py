"""Load a model: the embedded default, a local folder, a GGUF file or a Hugging Face id."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import final

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from steno.errors import BadArgument, ModelError, UnknownModel, UnsupportedAttention, nearest
from steno.models.default import DEFAULT_MODEL
from steno.models.embedded import EMBEDDED_MODELS, embedded_folder
from steno.models.folder_cache import Notify, default_cache_dir, print_notice
from steno.models.gguf_file import gguf_folder
from steno.models.identity import model_hash
from steno.models.quiet import quiet_transformers
from steno.models.weights import check_weights, cpu_has_bfloat16, shrink_weights

DTYPES: Mapping[str, torch.dtype] = MappingProxyType({
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
})  # fmt: skip

HOSTED_LAYERS = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv", "moe", "mlp"}
)
"""Kinds of layers that a cache can hold: the first under a recipe, the others as transformers' own."""


@final
@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that is ready to read: in eval mode, without gradients, with the attention that transformers chose."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """Short name for reports: the embedded name, the folder's or file's name, or the Hugging Face id."""
    source: str
    """What transformers loaded from: a folder, or a Hugging Face id."""
    max_positions: int | None
    """Longest sequence in tokens that the model was made for; None if its config does not say."""
    model_hash: str
    """See `model_hash`: of the checkpoint, whatever `weights` made of it."""
    weights: str | None = None
    """Format of the linear layers; None: as the model computes."""

    @cached_property
    def tokenizer_hash(self) -> str:
        """16 hexadecimal digits that identify the tokens of the vocabulary and their ids."""
        digest = hashlib.sha256()
        for token, idx in sorted(self.tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
            digest.update(f"{idx} {token}\n".encode(errors="surrogatepass"))
        return digest.hexdigest()[:16]


def load_model(
    source: str | Path = DEFAULT_MODEL,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    weights: str | None = None,
    cache_dir: Path | None = None,
    notify: Notify = print_notice,
) -> LoadedModel:
    """Load a decoder-only language model and its tokenizer.

    Parameters
    ----------
    source
        In this order: the name of an embedded model, an existing folder with `config.json`, an existing `.gguf` file,
        or a Hugging Face id `org/name`. A `Path` is never taken for a name or an id.
    dtype
        Of the weights and the computation; default: see `default_dtype`.
    device
        Default: `cuda` where there is one, else `cpu`.
    weights
        Format of the linear layers, for faster steps on x86 CPUs: `bf16` (the same results sooner, for a model in bfloat16),
        `fp16`, `int8` or `int4`; default: as `dtype` says.
        See `steno.models.weights`, and docs/performance.md for what each gains and loses.
    cache_dir
        Where converted models are kept; default: `default_cache_dir()`.
    notify
        Receives one line before each step that takes long; default: standard error.

    Raises
    ------
    ModelError
        The model cannot be found, downloaded or read. `ChecksumError`: a download is not the pinned file.
        `UnsupportedAttention`: steno cannot take over its attention.
    BadArgument
        Unknown `dtype`, `device` or `weights`, or `weights` on another device than an x86 CPU.
    """
    wanted = _parse_dtype(dtype)
    place = _parse_device(device)
    check_weights(weights, place)
    location, name = _resolve(source, cache_dir or default_cache_dir(), notify)
    if isinstance(location, str):
        notify(f"looking for {name} in the Hugging Face cache and on the hub")
    model, tokenizer = _from_pretrained(location, name, wanted, place)
    check_hostable(model)
    model.requires_grad_(False).eval().to(place)
    text_config = model.config.get_text_config()
    identity = model_hash(model)
    if weights is not None:
        shrink_weights(model, weights)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        source=str(location),
        max_positions=getattr(text_config, "max_position_embeddings", None),
        model_hash=identity,
        weights=weights,
    )


def default_dtype(config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype to compute in when the caller names none.

    On CUDA bfloat16. On a CPU with bfloat16 instructions the checkpoint's own, but bfloat16 for a float16 one; on any
    other CPU float32, because 16-bit arithmetic is emulated there and slower than float32.
    """
    checkpoint = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if device.type != "cpu":
        return torch.bfloat16
    if checkpoint == torch.float32 or not cpu_has_bfloat16():
        return torch.float32
    return torch.bfloat16


def check_hostable(model: PreTrainedModel) -> None:
    """Raise `UnsupportedAttention` unless steno can take over the attention and the cache of `model`.

    It must be a causal decoder without cross-attention and without recurrent layers, whose attention goes through
    transformers' attention registry.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - HOSTED_LAYERS
    causal = {part.is_causal for part in model.modules() if isinstance(getattr(part, "is_causal", None), bool)}
    if model.config.is_encoder_decoder:
        reason = "is an encoder-decoder"
    elif model._is_stateful:
        reason = "keeps a recurrent state instead of keys and values"
    elif kinds:
        reason = f"has layers of the kind {', '.join(sorted(kinds))}"
    elif not model._supports_attention_backend:
        reason = "does not call its attention through transformers' attention registry"
    elif not model.can_generate() or causal == {False}:
        reason = "is not a causal language model"
    else:
        return
    raise UnsupportedAttention(
        f"{type(model).__name__} ({model.config.model_type}) {reason}; "
        f"give a decoder-only model with full or sliding-window attention, such as Llama, Qwen or {DEFAULT_MODEL}."
    )


def _resolve(source: str | Path, cache_dir: Path, notify: Notify) -> tuple[str | Path, str]:
    """What transformers shall load from, and the name for reports."""
    if isinstance(source, str) and source in EMBEDDED_MODELS:
        return embedded_folder(source, cache_dir=cache_dir, notify=notify), source
    path = Path(source).expanduser()
    if str(source) and path.is_dir():
        if not (path / "config.json").is_file():
            raise UnknownModel(
                f"{path} holds no config.json; give a folder that `save_pretrained` wrote, or a .gguf file."
            )
        return path, path.resolve().name
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UnknownModel(f"a model file must end in .gguf; got {path}; give its folder, or a GGUF file.")
        return gguf_folder(path, cache_dir=cache_dir, notify=notify), path.stem
    text = str(source)
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) and not text.endswith(".gguf"):
        return text, text
    if isinstance(source, Path) or "/" in text or "\\" in text or text.startswith("~") or text.endswith(".gguf"):
        raise UnknownModel(f"no such file or folder: {path}; check the path, or give a name such as {DEFAULT_MODEL!r}.")
    raise UnknownModel(
        f"unknown model {text!r}; {nearest(text, EMBEDDED_MODELS)} A local folder, a .gguf file or a Hugging Face id "
        "`org/name` can be given too."
    )


def _from_pretrained(
    location: str | Path, name: str, dtype: torch.dtype | None, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(location)
            tokenizer = AutoTokenizer.from_pretrained(location)
            model, info = AutoModelForCausalLM.from_pretrained(
                location, config=config, dtype=dtype or default_dtype(config, device), output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise _load_error(location, name, error) from error
    if info["missing_keys"]:  # transformers would only warn, and leave them random
        raise ModelError(f"{name} lacks weights, such as {min(info['missing_keys'])!r}; get the model again.")
    return model, tokenizer


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise BadArgument(f"`dtype` must name a floating-point type; got dtype={dtype!r}; {nearest(dtype, DTYPES)}")
        return DTYPES[dtype]
    if dtype is not None and not dtype.is_floating_point:
        raise BadArgument(
            f"`dtype` must be a floating-point type; got dtype={dtype}; valid: {', '.join(sorted(DTYPES))}."
        )
    return dtype


def _parse_device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise BadArgument(f"`device` must be `cpu` or `cuda`; got device={device!r}.") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise BadArgument(f"`device` must be one that torch sees here; got device={device!r} without CUDA; use `cpu`.")
    return place


def _load_error(location: str | Path, name: str, error: Exception) -> ModelError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
    if isinstance(location, Path):
        return ModelError(f"cannot load {location}: {reason}; give the whole folder of a decoder-only language model.")
    missing = _hub_problem(error)
    return ModelError(f"cannot load {name!r} from the Hugging Face hub: {missing or reason}.")


def _hub_problem(error: BaseException | None) -> str | None:
    """The cause, in the user's words, of an error that came from the hub client."""
    while error is not None:
        if isinstance(error, GatedRepoError):
            return "access to it must be granted first; log in with `hf auth login`"
        if isinstance(error, RepositoryNotFoundError):
            return "there is no such model; check the spelling, or log in if it is private"
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            return "it is not in the local cache and the hub cannot be reached; connect to the network or give a folder"
        error = error.__cause__ or error.__context__
    return None
