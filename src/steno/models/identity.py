"""A short, stable name for a model's config and weights, under which calibrations are kept."""

from __future__ import annotations

import hashlib
import json
import re

import torch
from transformers import PreTrainedModel

_VOLATILE = re.compile(r"transformers_version|dtype|torch_dtype|architectures|use_cache|_.*")
_SAMPLES = 64


def model_hash(model: PreTrainedModel) -> str:
    """Return 16 hexadecimal digits that identify the config and the weights of `model`.

    Hashed are the config's fields that differ from the defaults (but version, dtype and path), and of every parameter
    its name, its shape and 64 values at even distances, as float32. So the hash costs milliseconds, does not depend on
    where the model came from, and is the same whether a bfloat16 checkpoint is loaded as bfloat16 or float32. It tells
    checkpoints apart; it does not protect against a deliberate change of single weights.
    """
    config = {key: value for key, value in model.config.to_diff_dict().items() if not _VOLATILE.fullmatch(key)}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"\n{name} {tuple(parameter.shape)} ".encode())
        if parameter.numel() and not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            picks = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
            digest.update(flat[picks.to(flat.device)].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]
