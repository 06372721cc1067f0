"""Whether Triton's kernels can run, and on what: compiled on CUDA, or through Triton's own interpreter on CPU.

Triton interprets kernels where its switch, the environment variable TRITON_INTERPRET, was set before it was imported.
That is for tests: thousands of times slower than a GPU, with the same kernels.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor

from steno.errors import BadArgument, KernelError


@lru_cache(maxsize=1)
def why_missing() -> str | None:
    """Why Triton cannot be used and what to do about it; None where it can."""
    try:
        import_module("triton")
    except ImportError as error:
        return f"triton does not import ({error}); pip install 'stenokv[cuda]'"
    return None


def require() -> None:
    """Raises `KernelError` where Triton is missing."""
    reason = why_missing()
    if reason is not None:
        raise KernelError(f"the Triton kernels are missing: {reason}")


def is_interpreted(kernel: object) -> bool:
    """Whether a kernel runs through Triton's interpreter."""
    return not isinstance(kernel, import_module("triton").JITFunction)


def check_device(kernel: object, x: Tensor) -> None:
    """Raises `BadArgument` unless `kernel` can read `x` where it lies."""
    wanted = "cpu" if is_interpreted(kernel) else "cuda"
    if x.device.type != wanted:
        how = "interpreted" if wanted == "cpu" else "compiled"
        raise BadArgument(f"the Triton kernels are {how} and take tensors on {wanted}; got one on {x.device}.")


def compute_dtype(kernel: object, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel should read and write for tensors of `dtype`.

    The interpreter has no bfloat16: it truncates to it instead of rounding, and multiplies its bits as integers.
    """
    return torch.float32 if dtype == torch.bfloat16 and is_interpreted(kernel) else dtype
