"""Attention of many queries over dense keys by the native library, on CPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from steno.errors import BadArgument
from steno.kernels import native

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`Format` of csrc/attend.h."""


class _DenseProblem(ctypes.Structure):
    """`struct DenseProblem` of csrc/dense.h."""

    _fields_ = [
        ("q", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("mass", ctypes.c_void_p),
        ("q_strides", ctypes.c_int64 * 3),
        ("out_strides", ctypes.c_int64 * 3),
        ("format", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("num_queries", ctypes.c_int64),
        ("num_keys", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


def can_run(*tensors: Tensor) -> bool:
    """Whether the library is there and takes these tensors."""
    return _fits(*tensors) and native.why_missing() is None


def _fits(*tensors: Tensor) -> bool:
    return all(x.device.type == "cpu" and x.dtype in FORMATS for x in tensors)


def _check_types(*tensors: Tensor) -> None:
    if not _fits(*tensors):
        got = ", ".join(f"{x.dtype} on {x.device}" for x in tensors)
        raise BadArgument(f"the native kernel takes fp32, bf16 or fp16 on cpu; got {got}.")


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    isa: str | None = None,
    num_threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention with its log-sum-exp, computed in fp32.

    Parameters
    ----------
    q: `[B, H, T, D]`; k, v: `[B, Hkv, S, D]` of one dtype; query head h reads KV head `h // (H / Hkv)`.
    causal: S >= T and query t sees keys `0 .. S - T + t`; otherwise all keys.
    isa, num_threads: as in `steno.kernels.attention.attend`.

    Returns
    -------
    out `[B, H, T, D]` in q's dtype, in memory `[B, T, H, D]`, and lse `[B, H, T]` fp32; 0 and -inf without a key.

    Raises
    ------
    BadArgument: shapes or dtypes do not fit. KernelError: the library, or `isa`, is not there.
    """
    out, lse, _ = _flash(q, k, v, scale=scale, causal=causal, mass=False, isa=isa, num_threads=num_threads)
    return out, lse


def flash_attention_and_mass(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, isa: str | None = None, num_threads: int | None = None
) -> tuple[Tensor, Tensor]:
    """Causal `flash_attention` and, from the same weights, what `mass.attention_mass` says of each row: `[B, H, S]` fp32.

    Beside `flash_attention` a thread holds the weights of 48 queries and one mass: `(48 + H) * S` fp32.
    """
    out, _, mass = _flash(q, k, v, scale=scale, causal=True, mass=True, isa=isa, num_threads=num_threads)
    assert mass is not None
    return out, mass


def _flash(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mass: bool, isa: str | None, num_threads: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, lse, and the mass if it is wanted."""
    _check_types(q, k, v)
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0]:
        raise BadArgument(f"q and k must be 4-dimensional, with as many rows; got {[*q.shape]} and {[*k.shape]}.")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise BadArgument(f"k and v must be alike; got {[*k.shape]} {k.dtype} and {[*v.shape]} {v.dtype}.")
    if causal and q.shape[2] > k.shape[2]:
        raise BadArgument(f"causal attention needs at least as many keys as queries; got {k.shape[2]}, {q.shape[2]}.")
    lse = torch.full(q.shape[:3], -torch.inf)
    masses = torch.zeros(*q.shape[:2], k.shape[2]) if mass else None
    queries, keys, values = q.to(torch.float32), k.contiguous(), v.contiguous()
    if queries.stride(3) != 1:
        queries = queries.contiguous()
    # what follows an attention reads the heads of a token together
    out = torch.empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
    problem = _problem(queries, keys, lse, out, scale=scale, isa=isa, num_threads=num_threads)
    if queries.numel() and keys.numel():
        problem.values, problem.causal = values.data_ptr(), causal
        problem.q_strides[:], problem.out_strides[:] = queries.stride()[:3], out.stride()[:3]
        if masses is not None:
            problem.mass = masses.data_ptr()
        native.check_status(native.library().steno_flash_attention(ctypes.byref(problem)), isa)
    else:
        out.zero_()
    return out.to(q.dtype), lse, masses


def max_attention(
    q: Tensor, k: Tensor, lse: Tensor, *, scale: float, isa: str | None = None, num_threads: int | None = None
) -> Tensor:
    """Like `mass.max_attention`; raises `KernelError` where the library or `isa` is missing."""
    _check_types(q, k)
    if lse.shape != q.shape[:2]:
        raise BadArgument(f"there must be one lse per query, {[*q.shape[:2]]}; got {[*lse.shape]}.")
    queries, keys, norms = q.to(torch.float32).contiguous(), k.contiguous(), lse.to(torch.float32).contiguous()
    best = torch.full(k.shape[:2], -torch.inf)
    problem = _problem(queries, keys, norms, best, scale=scale, isa=isa, num_threads=num_threads)
    if queries.numel() and keys.numel():
        native.check_status(native.library().steno_max_attention(ctypes.byref(problem)), isa)
    return best.exp_()


def _problem(
    q: Tensor, k: Tensor, lse: Tensor, out: Tensor, *, scale: float, isa: str | None, num_threads: int | None
) -> _DenseProblem:
    """The arguments that both functions share: contiguous `[..., H, T, D]` and `[..., Hkv, S, D]`."""
    (num_heads, num_queries, head_dim), (num_kv_heads, num_keys, _) = q.shape[-3:], k.shape[-3:]
    if not num_kv_heads or num_heads % num_kv_heads or k.shape[-1] != head_dim:
        raise BadArgument(
            f"q must be [a multiple of {num_kv_heads}, T, {k.shape[-1]}] for these keys; got {[*q.shape]}."
        )
    return _DenseProblem(
        q=q.data_ptr(),
        keys=k.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        format=FORMATS[k.dtype],
        num_heads=k.shape[:-2].numel(),
        kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        num_queries=num_queries,
        num_keys=num_keys,
        head_dim=head_dim,
        scale=scale,
        isa=native.number_of_isa(isa),
        num_threads=num_threads or torch.get_num_threads(),
    )
