"""Choose the implementation of attention."""

from __future__ import annotations

import warnings
from functools import lru_cache

from torch import Tensor

from steno.errors import BadArgument, StenoWarning, nearest
from steno.kernels import native, triton_runtime

from . import cpu, naive
from .spans import DENSE_DTYPES
from .table import Append, SpanTable

IMPLS = ("auto", "cpu", "triton", "naive")


def attend(
    q: Tensor,
    table: SpanTable,
    *,
    append: Append | None = None,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
    impl: str = "auto",
    isa: str | None = None,
    num_threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of queries over the spans of a table.

    Parameters
    ----------
    q: `[B, H, T, D]`; query head h reads KV head h // G.
    append: tokens to copy behind the tails first, as `SpanTable.append` does; natively in the same call.
    scale: factor on the logits; softcap: if given, logits become `softcap * tanh(logits / softcap)`.
    causal: the last span of each head ends with the T new tokens, and query t does not see its last T - 1 - t.
    impl: `auto` (native for CPU tensors where the library is there, Triton for CUDA tensors where it is installed, else
        naive), `cpu`, `triton` or `naive`.
    isa: instruction set of the native kernel, one of `native.ISAS`; None: the best of this machine.
        With pages of a codebook avx512 stands in for vnni and bf16.
    num_threads: threads of the native kernel; None: `torch.get_num_threads()`.

    Returns
    -------
    out `[B, H, T, D]` in the dtype of q and lse `[B, H, T]` fp32, the log-sum-exp of the logits; 0 and -inf without a
    visible token.

    Raises
    ------
    BadArgument: shapes or devices do not fit. KernelError: the native library, `isa` or Triton was asked for by name and
        is not there.
    """
    _check(q, table, impl)
    if impl == "auto":
        impl = _choose(q, asked=isa is not None)
        if impl == "triton" and table.has_codebooks:
            impl = "naive"
    if append is not None and (impl != "cpu" or not _fits_natively(append, table)):
        table.append(*append)
        append = None
    if impl == "naive":
        return naive.attend(q, table, scale=scale, softcap=softcap, causal=causal)
    if impl == "triton":
        triton_runtime.require()
        from . import triton  # not before it is needed: Triton is optional, and slow to import

        return triton.attend(q, table, scale=scale, softcap=softcap, causal=causal)
    return cpu.attend(
        q, table, append=append, scale=scale, softcap=softcap, causal=causal, isa=isa, num_threads=num_threads
    )


def _fits_natively(append: Append, table: SpanTable) -> bool:
    """Whether the native kernel can copy these tokens as they are; torch converts others."""
    keys, values, _ = append
    return table.tail is not None and all(x.dtype == table.tail[0].dtype and x.stride(-1) == 1 for x in (keys, values))


def _choose(q: Tensor, *, asked: bool) -> str:
    if asked:
        return "cpu"
    if q.device.type not in ("cpu", "cuda") or q.dtype not in DENSE_DTYPES:
        return "naive"
    impl, reason = ("cpu", native.why_missing()) if q.device.type == "cpu" else ("triton", triton_runtime.why_missing())
    if reason is None:
        return impl
    _warn_once(reason)
    return "naive"


@lru_cache(maxsize=1)
def _warn_once(reason: str) -> None:
    warnings.warn(f"attention runs in plain torch, many times slower: {reason}", StenoWarning, stacklevel=4)


def _check(q: Tensor, table: SpanTable, impl: str) -> None:
    if impl not in IMPLS:
        raise BadArgument(f"unknown impl {impl!r}; {nearest(impl, IMPLS)}")
    rows, heads, head_dim = table.num_rows, table.num_kv_heads, table.head_dim
    if q.ndim != 4 or q.shape[0] != rows or q.shape[1] % heads or not q.shape[1] or q.shape[3] != head_dim:
        raise BadArgument(f"q must be [{rows}, a multiple of {heads}, T, {head_dim}] for this table; got {[*q.shape]}.")
