"""LMCache's CacheGen on given keys and values, in LMCache's own environment and on its CPU path: bytes, seconds, what comes back.

    python run_lmcache.py IN.safetensors OUT.safetensors CHUNK_TOKENS

IN has `kv` `[L, 2, T, Hkv, D]`; OUT gets the same, decoded. Each chunk is encoded by itself, as its storage backends do. Prints
one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import lmcache
import torch
from lmcache.storage_backend.serde.cachegen_basics import CacheGenGPUEncoderOutput
from lmcache.storage_backend.serde.cachegen_decoder import decode_function_gpu, do_dequantize
from lmcache.storage_backend.serde.cachegen_encoder import encode_function
from safetensors.torch import load_file, save_file


def bins(num_layers: int, first: int) -> torch.Tensor:
    """Its levels for models of 10 layers or more: 32 for the first ones, 16 for the others."""
    return torch.tensor([32.0] * first + [16.0] * (num_layers - first))


def decoded(data: bytes, key_bins: torch.Tensor, value_bins: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    found: Any = CacheGenGPUEncoderOutput.from_bytes(data)
    num_layers, num_tokens = found.max_tensors_key.shape[:2]
    room = torch.zeros((num_tokens, 2 * num_layers * found.cdf.shape[1]), dtype=torch.uint8)
    key, value = decode_function_gpu(found.cdf, found.data_chunks, num_layers, num_tokens, room)
    key = do_dequantize(key, key_bins, found.max_tensors_key)
    value = do_dequantize(value, value_bins, found.max_tensors_value)
    both = torch.stack([key, value], 1)  # [L, 2, T, C]
    return both.unflatten(-1, (found.num_heads, found.head_size)).to(dtype)


def main() -> None:
    source, target, chunk_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    kv = load_file(source)["kv"]
    key_bins, value_bins = bins(len(kv), 10), bins(len(kv), 2)
    parts = [part.contiguous() for part in kv.split(chunk_tokens, dim=2)]
    # the first call compiles
    first = encode_function(parts[-1], None, key_bins, value_bins, parts[-1].shape[2]).to_bytes()
    decoded(first, key_bins, value_bins, kv.dtype)
    started = time.perf_counter()
    packed = [encode_function(p, None, key_bins, value_bins, p.shape[2]).to_bytes() for p in parts]
    encoded = time.perf_counter()
    back = [decoded(data, key_bins, value_bins, kv.dtype) for data in packed]
    done = time.perf_counter()
    save_file({"kv": torch.cat(back, 2).contiguous()}, target)
    print(
        json.dumps(
            {
                "version": lmcache.__version__,
                "bytes": sum(map(len, packed)),
                "encode_s": encoded - started,
                "decode_s": done - encoded,
            }
        )
    )


if __name__ == "__main__":
    main()
