"""Attention by the native library, on CPU."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from steno.errors import BadArgument, KernelError, nearest

from .table import SpanTable

QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = ("portable", "avx2", "avx512", "vnni")
"""In the order of the native numbers, slowest first."""

ABI_VERSION = 3
"""Must equal `steno_abi_version()`: the layout of `_Problem` and of the table's entries."""

LIBRARY_DIR = Path(__file__).parent.parent


class _Problem(ctypes.Structure):
    """`struct Problem` of csrc/attend.h."""

    _fields_ = [
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("entries", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("num_heads", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("num_queries", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("causal", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


def attend(
    q: Tensor,
    table: SpanTable,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
    isa: str | None = None,
    num_threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Like `naive.attend`, for CPU tensors; raises `KernelError` where the library or `isa` is missing."""
    isa_number = number_of_isa(isa)
    if q.device.type != "cpu" or q.dtype not in QUERY_DTYPES:
        raise BadArgument(f"the native kernel takes fp32, bf16 or fp16 queries on cpu; got {q.dtype} on {q.device}.")
    queries = q.to(torch.float32).contiguous()
    out = torch.empty_like(queries)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    num_heads = table.num_rows * table.num_kv_heads
    problem = _Problem(
        q=queries.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        entries=table.entries.data_ptr(),
        offsets=table.offsets.data_ptr(),
        num_heads=num_heads,
        group=q.shape[0] * q.shape[1] // num_heads,
        num_queries=q.shape[2],
        head_dim=q.shape[3],
        scale=scale,
        softcap=softcap or 0.0,
        causal=causal,
        isa=isa_number,
        num_threads=num_threads or torch.get_num_threads(),
    )
    check_status(library().steno_attend(ctypes.byref(problem)), isa)
    return out.to(q.dtype), lse


def why_missing() -> str | None:
    """Why the native library cannot be used and what to do about it; None where it can."""
    found = _load(LIBRARY_DIR)
    return found if isinstance(found, str) else None


def available_isas() -> list[str]:
    """The values of `isa` that this machine and this build can run."""
    found = _load(LIBRARY_DIR)
    return [] if isinstance(found, str) else [isa for i, isa in enumerate(ISAS) if found.steno_has_isa(i)]


def library() -> ctypes.CDLL:
    """The native library; raises `KernelError` where it is missing."""
    found = _load(LIBRARY_DIR)
    if isinstance(found, str):
        raise KernelError(f"the native attention kernel is missing: {found}")
    return found


def number_of_isa(isa: str | None) -> int:
    """The native number of an instruction set; None: the best that this machine and this build can run."""
    if isa is None:
        return max(i for i in range(len(ISAS)) if library().steno_has_isa(i))
    if isa not in ISAS:
        raise BadArgument(f"unknown isa {isa!r}; {nearest(isa, ISAS)}")
    return ISAS.index(isa)


def check_status(status: int, isa: str | None) -> None:
    """Raises what the result of a native function stands for."""
    if status == 1:
        raise KernelError(f"isa {isa!r} is not available on this machine.")
    if status == 2:
        raise BadArgument("page ids must lie within their span; got one outside.")
    if status:
        raise MemoryError("no memory for the scratch of the native attention kernel.")


@lru_cache(maxsize=4)
def _load(folder: Path) -> ctypes.CDLL | str:
    """The library in `folder`, or the reason why there is none."""
    # torch is imported first on purpose: the library then binds to its libgomp, and there is one pool of threads
    fix = "install a C++ compiler, then pip install --force-reinstall --no-deps --no-binary stenokv stenokv"
    found = sorted(folder.glob("_native*.so")) + sorted(folder.glob("_native*.pyd"))
    if not found:
        return f"it was not compiled when the package was installed; {fix}"
    try:
        native = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load ({error}); {fix}"
    version = native.steno_abi_version()
    if version != ABI_VERSION:
        return f"{found[0].name} has interface version {version}, not {ABI_VERSION}; {fix}"
    native.steno_attend.argtypes = [ctypes.POINTER(_Problem)]
    return native
