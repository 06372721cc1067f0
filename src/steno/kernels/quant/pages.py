"""Pages: 64 tokens of one KV head in a quantized format.

Keys are stored transposed, `[D, 64]` with groups of tokens per channel, values as `[64, D]` with groups of channels per
token. Both halves of attention are then one operation, `out[c] += sum_r coef[r, group(c)] * code[r, c]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steno.errors import BadArgument, nearest
from steno.kernels import triton_runtime
from steno.types import PAGE_TOKENS, PageFormat

from . import cpu
from .codebooks import CODEBOOKS, dequantize_tokens, param_bytes, quantize_tokens
from .groups import dequantize_groups, quantize_groups
from .packing import LANES, code_bytes, pack_codes, unpack_codes

IMPLS = ("auto", "torch", "triton")


@dataclass(frozen=True, kw_only=True)
class Pages:
    """P pages of one format, of any number of heads; every tensor is contiguous.

    key_codes, value_codes: `[P, bytes]` uint8.
    key_params: `[P, 2, 64 / key_group, D]` fp16, value_params: `[P, 2, ceil(D / value_group), 64]` fp16: scales, then
    minima. With a codebook both are as `quantize_tokens` of codebooks.py gives them.
    """

    fmt: PageFormat
    head_dim: int
    key_codes: Tensor
    value_codes: Tensor
    key_params: Tensor
    value_params: Tensor

    @property
    def num_pages(self) -> int:
        return self.key_codes.shape[0]

    @property
    def nbytes(self) -> int:
        return self.num_pages * page_bytes(self.fmt, self.head_dim)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """key_codes, value_codes, key_params, value_params."""
        return self.key_codes, self.value_codes, self.key_params, self.value_params

    def __getitem__(self, pages: slice) -> Pages:
        """A run of consecutive pages, as views."""
        if pages.step not in (None, 1):
            raise BadArgument(f"pages are sliced with step 1; got {pages.step}.")
        return _pages(self.fmt, self.head_dim, [t[pages] for t in self.tensors])


def encode_pages(keys: Tensor, values: Tensor, fmt: PageFormat, *, impl: str = "auto") -> Pages:
    """Quantize keys and values `[..., 64, D]` into pages, in the order of the leading axes; works on any device.

    impl: `cpu` (native; reads them where they lie, strided as they are), `triton`, `torch`, all with the same bytes, or
    `auto`, the first that is there for the device. Infinities become the ends of what fp16 can hold; a group with a NaN
    becomes NaN. Raises `BadArgument` for shapes, formats or an impl that do not fit, `KernelError` where an impl is asked
    for and missing.
    """
    if keys.ndim < 3 or keys.shape != values.shape or keys.shape[-2] != PAGE_TOKENS or not keys.shape[-1]:
        shapes = f"{[*keys.shape]}, {[*values.shape]}"
        raise BadArgument(f"keys and values must both be [..., {PAGE_TOKENS}, D]; got {shapes}.")
    head_dim = keys.shape[-1]
    _check_format(fmt, head_dim)
    if fmt.codebook is not None:
        return _encode_codebook(keys.flatten(0, -3), values.flatten(0, -3), fmt, impl)
    if impl == "cpu" or (impl == "auto" and cpu.can_run(keys, values)):
        return _pages(fmt, head_dim, [*cpu.encode_pages(keys, values, fmt)])
    keys, values = keys.flatten(0, -3), values.flatten(0, -3)
    if _chosen(impl, keys) == "triton":
        from . import triton  # not before it is needed: Triton is optional, and slow to import

        return _pages(fmt, head_dim, [*triton.encode(keys, values, fmt)])
    key_codes, key_params = quantize_groups(keys.transpose(1, 2), bits=fmt.bits, group=fmt.key_group)
    value_codes, value_params = quantize_groups(values, bits=fmt.bits, group=fmt.value_group)
    codes = [pack_codes(key_codes, fmt.bits), pack_codes(value_codes, fmt.bits)]
    return _pages(fmt, head_dim, [*codes, key_params, value_params])


def _encode_codebook(keys: Tensor, values: Tensor, fmt: PageFormat, impl: str) -> Pages:
    assert fmt.codebook is not None
    _torch_alone(impl, fmt)
    book = CODEBOOKS[fmt.codebook]
    key_codes, key_params = quantize_tokens(keys, book, fmt.key_group)
    value_codes, value_params = quantize_tokens(values, book, fmt.value_group)
    codes = [pack_codes(key_codes.transpose(1, 2), fmt.bits), pack_codes(value_codes, fmt.bits)]
    return _pages(fmt, keys.shape[-1], [*codes, key_params, value_params])


def decode_pages(pages: Pages, dtype: torch.dtype = torch.float32, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """The keys and values `[P, 64, D]` that `pages` stand for. impl: as in `encode_pages`."""
    fmt, head_dim = pages.fmt, pages.head_dim
    if fmt.codebook is not None:
        return _decode_codebook(pages, dtype, impl)
    if _chosen(impl, pages.key_codes) == "triton":
        from . import triton

        return triton.decode(pages.tensors, fmt, head_dim, dtype)
    key_codes = unpack_codes(pages.key_codes, head_dim, PAGE_TOKENS, fmt.bits)  # [P, D, 64]
    value_codes = unpack_codes(pages.value_codes, PAGE_TOKENS, head_dim, fmt.bits)  # [P, 64, D]
    keys = dequantize_groups(key_codes, pages.key_params, group=fmt.key_group, dtype=dtype)
    values = dequantize_groups(value_codes, pages.value_params, group=fmt.value_group, dtype=dtype)
    return keys.transpose(1, 2).contiguous(), values.contiguous()


def _decode_codebook(pages: Pages, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor]:
    fmt, head_dim = pages.fmt, pages.head_dim
    assert fmt.codebook is not None
    _torch_alone(impl, fmt)
    book = CODEBOOKS[fmt.codebook]
    key_codes = unpack_codes(pages.key_codes, head_dim, PAGE_TOKENS, fmt.bits)  # [P, D, 64]
    value_codes = unpack_codes(pages.value_codes, PAGE_TOKENS, head_dim, fmt.bits)  # [P, 64, D]
    keys = dequantize_tokens(key_codes.transpose(1, 2), pages.key_params, book, fmt.key_group, dtype)
    return keys, dequantize_tokens(value_codes, pages.value_params, book, fmt.value_group, dtype)


def _torch_alone(impl: str, fmt: PageFormat) -> None:
    if impl not in ("auto", "torch"):
        raise BadArgument(f"pages of {fmt.codebook} are encoded and decoded by plain torch alone; got impl={impl!r}.")


def _chosen(impl: str, x: Tensor) -> str:
    if impl not in IMPLS:
        raise BadArgument(f"unknown impl {impl!r}; {nearest(impl, IMPLS)}")
    if impl == "auto":
        return "triton" if x.device.type == "cuda" and triton_runtime.why_missing() is None else "torch"
    if impl == "triton":
        triton_runtime.require()
    return impl


def page_bytes(fmt: PageFormat, head_dim: int, value_dim: int | None = None) -> int:
    """Exact bytes of one page: codes and params of its keys and values. value_dim: where it is not `head_dim`."""
    value_dim = head_dim if value_dim is None else value_dim
    for dim in (head_dim, value_dim):
        _check_format(fmt, dim)
    codes = code_bytes(head_dim, PAGE_TOKENS, fmt.bits) + code_bytes(PAGE_TOKENS, value_dim, fmt.bits)
    if fmt.codebook is not None:
        sides = ((fmt.key_group, head_dim), (fmt.value_group, value_dim))
        return codes + sum(param_bytes(CODEBOOKS[fmt.codebook], group, PAGE_TOKENS, dim) for group, dim in sides)
    num_groups = PAGE_TOKENS // fmt.key_group * head_dim + -(-value_dim // fmt.value_group) * PAGE_TOKENS
    return codes + num_groups * 2 * torch.float16.itemsize


def cat_pages(parts: Sequence[Pages]) -> Pages:
    """The pages of all parts, in order; they must share format, head_dim and device."""
    if not parts:
        raise BadArgument("cat_pages needs at least one part; got none.")
    kinds = {(part.fmt, part.head_dim) for part in parts}
    if len(kinds) > 1:
        raise BadArgument(f"pages of one format and head_dim can be joined; got {kinds}.")
    columns = zip(*(part.tensors for part in parts), strict=True)
    return _pages(parts[0].fmt, parts[0].head_dim, [torch.cat(column) for column in columns])


def _pages(fmt: PageFormat, head_dim: int, tensors: list[Tensor]) -> Pages:
    key_codes, value_codes, key_params, value_params = tensors
    return Pages(
        fmt=fmt,
        head_dim=head_dim,
        key_codes=key_codes,
        value_codes=value_codes,
        key_params=key_params,
        value_params=value_params,
    )


def _check_format(fmt: PageFormat, head_dim: int) -> None:
    if fmt.codebook is not None:
        return _check_codebook(fmt, fmt.codebook, head_dim)
    if fmt.bits not in (8, 4, 2):
        raise BadArgument(f"bits must be 8, 4 or 2; got {fmt.bits}.")
    if fmt.key_group not in (16, 32, 64):
        raise BadArgument(f"key_group must be 16, 32 or 64 tokens; got {fmt.key_group}.")
    if fmt.value_group < 1 or (fmt.value_group % LANES and fmt.value_group < head_dim):
        raise BadArgument(
            f"value_group must be a multiple of {LANES} or at least head_dim {head_dim}; got {fmt.value_group}."
        )


def _check_codebook(fmt: PageFormat, name: str, head_dim: int) -> None:
    book = CODEBOOKS.get(name)
    if book is None:
        raise BadArgument(f"unknown codebook {name!r}; {nearest(name, CODEBOOKS)}")
    if fmt.bits != book.bits:
        raise BadArgument(f"codes of {name} have {book.bits} bits; got bits={fmt.bits}.")
    for group in (fmt.key_group, fmt.value_group):
        if group < head_dim and (group < 1 or group % LANES or book.whole_token):
            need = "at least head_dim" if book.whole_token else f"a multiple of {LANES} or at least head_dim"
            raise BadArgument(f"groups of {name} must be {need} {head_dim}; got {group}.")
