"""Which classes of segments a file can hold, and how: one line each in `FORMS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from steno.cache.segment import DenseSegment, PagedSegment, Segment
from steno.cache.transformed import Basis, MatrixBasis, TransformedSegment
from steno.errors import BadArgument, CacheError, DamagedFile
from steno.kernels.quant import Pages, page_bytes
from steno.kernels.quant.codebooks import CODEBOOKS
from steno.kernels.quant.packing import code_bytes
from steno.methods.transform.hadamard import Hadamard, hadamard_basis, rotation_on
from steno.types import PAGE_TOKENS, PageFormat


@final
@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix `[N, C]` of a segment; the other fields are those of `ArraySpec`."""

    rows: Tensor
    offsets: tuple[int, ...]
    row_tokens: int
    context_columns: int = 1


@final
@dataclass(frozen=True, kw_only=True)
class Stored:
    """A segment as a file holds it: JSON fields, and matrices by name."""

    fields: Mapping[str, Any]
    matrices: Mapping[str, Matrix]


@final
@dataclass(frozen=True, kw_only=True)
class Form:
    """How segments of a class become `Stored` and back. `build` gets the fields, the tensors, KV heads and head dimension;
    it raises KeyError, TypeError, ValueError or `BadArgument` for what is none of its own."""

    store: Callable[[Any], Stored]
    build: Callable[[Mapping[str, Any], Mapping[str, Tensor], int, int], Segment]


def _store_dense(segment: DenseSegment) -> Stored:
    matrices = {"keys": segment.keys, "values": segment.values}
    if segment.counts is not None:
        matrices["log_counts"] = segment.counts[:, None]
    return Stored(
        fields={"offsets": list(segment.offsets)},
        matrices={name: Matrix(rows=x, offsets=segment.offsets, row_tokens=1) for name, x in matrices.items()},
    )


def _build_dense(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], num_heads: int, head_dim: int) -> Segment:
    offsets = _offsets(fields["offsets"], num_heads)
    keys, values = tensors["keys"], tensors["values"]
    expect(keys, (offsets[-1], head_dim))
    expect(values, (offsets[-1], head_dim))
    if keys.dtype != values.dtype or not keys.is_floating_point():
        raise ValueError(f"a dense segment holds floats of one kind, not {keys.dtype} and {values.dtype}")
    return DenseSegment(keys=keys, values=values, offsets=offsets, counts=_counts(tensors, offsets[-1]))


def _store_pages(segment: PagedSegment) -> Stored:
    pages, offsets, fmt = segment.pages, segment.offsets, segment.pages.fmt
    matrices = {
        name: Matrix(rows=x, offsets=offsets, row_tokens=PAGE_TOKENS, context_columns=x.shape[1])
        for name, x in (("key_codes", pages.key_codes), ("value_codes", pages.value_codes))
    }
    others = {"key_params": pages.key_params.flatten(1), "value_params": pages.value_params.flatten(1)}
    matrices |= {name: Matrix(rows=x, offsets=offsets, row_tokens=PAGE_TOKENS) for name, x in others.items()}
    if segment.counts is not None:
        counts = segment.counts.reshape(-1, PAGE_TOKENS)
        matrices["log_counts"] = Matrix(
            rows=counts, offsets=offsets, row_tokens=PAGE_TOKENS, context_columns=PAGE_TOKENS
        )
    fields = {"bits": fmt.bits, "key_group": fmt.key_group, "value_group": fmt.value_group, "offsets": list(offsets)}
    if fmt.codebook is not None:
        book = CODEBOOKS[fmt.codebook]
        fields |= {"codebook": fmt.codebook, "levels": list(book.levels), "byte_scales": book.byte_scales}
    return Stored(fields=fields, matrices=matrices)


def _build_pages(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], num_heads: int, head_dim: int) -> Segment:
    offsets = _offsets(fields["offsets"], num_heads)
    bits, key_group, value_group = (_int(fields[name]) for name in ("bits", "key_group", "value_group"))
    fmt = PageFormat(bits=bits, key_group=key_group, value_group=value_group, codebook=_codebook(fields))
    num_pages, of_page = offsets[-1], page_bytes(fmt, head_dim)
    codes = [tensors["key_codes"], tensors["value_codes"]]
    params = [tensors["key_params"], tensors["value_params"]]
    for i, (shape, dtype) in enumerate(_param_shapes(fmt, head_dim)):
        params[i] = expect(params[i], (num_pages, prod(shape)), dtype).reshape(num_pages, *shape)
    for x, (rows, columns) in zip(codes, ((head_dim, PAGE_TOKENS), (PAGE_TOKENS, head_dim)), strict=True):
        expect(x, (num_pages, code_bytes(rows, columns, fmt.bits)), torch.uint8)
    assert num_pages * of_page == sum(x.numel() * x.element_size() for x in codes + params), "formats agree on bytes"
    pages = Pages(
        fmt=fmt,
        head_dim=head_dim,
        key_codes=codes[0],
        value_codes=codes[1],
        key_params=params[0],
        value_params=params[1],
    )
    return PagedSegment(pages=pages, offsets=offsets, counts=_counts(tensors, num_pages, PAGE_TOKENS))


def _codebook(fields: Mapping[str, Any]) -> str | None:
    """The codebook of pages; its levels stand in the file for other readers, and must be those that we know."""
    name = fields.get("codebook")
    if name is None:
        return None
    if not isinstance(name, str) or name not in CODEBOOKS:
        raise ValueError(f"this steno knows no codebook {name!r}"[:200])
    book = CODEBOOKS[name]
    found = torch.tensor(fields["levels"], dtype=torch.float64)
    same = found.shape == (len(book.levels),) and torch.allclose(found, torch.tensor(book.levels).double(), atol=1e-6)
    if not same or fields["byte_scales"] is not book.byte_scales:
        raise ValueError(f"the file has other levels of {name} than this steno")
    return name


def _param_shapes(fmt: PageFormat, head_dim: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Of the params of the keys and of the values of a page."""
    if fmt.codebook is None:
        value_groups = -(-head_dim // fmt.value_group)
        shapes = [(2, PAGE_TOKENS // fmt.key_group, head_dim), (2, value_groups, PAGE_TOKENS)]
        return [(shape, torch.float16) for shape in shapes]
    groups = [-(-head_dim // group) for group in (fmt.key_group, fmt.value_group)]
    if CODEBOOKS[fmt.codebook].byte_scales:
        return [((4 + n * PAGE_TOKENS,), torch.uint8) for n in groups]
    return [((n, PAGE_TOKENS), torch.float16) for n in groups]


FORMS: Mapping[type[Segment], tuple[str, Form]] = MappingProxyType({
    DenseSegment: ("dense", Form(store=_store_dense, build=_build_dense)),
    PagedSegment: ("pages", Form(store=_store_pages, build=_build_pages)),
})  # fmt: skip
_BY_NAME = MappingProxyType(dict(FORMS.values()))
ROTATED = "hadamard "
"""Before the name of a form: what it holds lies in the basis of the Hadamard rotation."""


def store_segment(segment: Segment) -> tuple[str, Stored]:
    """The name of its form and the segment in it; raises `CacheError` for a class, or a basis, that has none."""
    if isinstance(segment, TransformedSegment):
        return _store_rotated(segment)
    if type(segment) not in FORMS:
        known = ", ".join(cls.__name__ for cls in FORMS)
        raise CacheError(f"a file can hold {known}, and no {type(segment).__name__} yet; save with another recipe.")
    name, form = FORMS[type(segment)]
    return name, form.store(segment)


def check_bases(bases: Sequence[Basis]) -> None:
    """Raises `CacheError` if segments in these bases have no form."""
    if len(bases) > 1 or any(_rotation_of(basis) is None for basis in bases):
        raise CacheError(
            "a lossless file cannot hold segments in another basis than that of hadamard yet; save with a quality from q1 to "
            "q5, or read with another recipe."
        )


def bases_of(transforms: Sequence[object], head_dim: int, device: torch.device) -> tuple[Basis, ...]:
    """Those that later tokens of a row change to; raises ValueError if no file can hold what the transforms make."""
    if not transforms:
        return ()
    if len(transforms) > 1 or not isinstance(transforms[0], Hadamard):
        raise ValueError("its recipe has a transform that no lossless file can hold")
    return (hadamard_basis(head_dim, head_dim, device),)


def _store_rotated(segment: TransformedSegment) -> tuple[str, Stored]:
    check_bases(segment.bases)
    name, stored = store_segment(segment.inner)
    matrix = _rotation_of(segment.basis)
    assert matrix is not None, "it was checked"
    basis = Matrix(rows=matrix, offsets=(0, len(matrix)), row_tokens=0, context_columns=len(matrix))
    return ROTATED + name, Stored(fields=stored.fields, matrices={**stored.matrices, "basis": basis})


def _rotation_of(basis: Basis) -> Tensor | None:
    """The matrix `[D, D]` of the Hadamard rotation if the basis is that; None for any other."""
    if not isinstance(basis, MatrixBasis):
        return None
    matrix = rotation_on(basis.key_matrix.shape[-1], basis.key_matrix.device)
    same = all(torch.equal(x, matrix[None]) for x in (basis.key_matrix, basis.value_matrix))
    return matrix if same else None


def _in_rotation(inner: Segment, basis: Tensor, head_dim: int) -> Segment:
    """The matrix stands in the file for other readers, and must be the one that we know."""
    known = hadamard_basis(head_dim, head_dim, basis.device)
    expect(basis, (head_dim, head_dim), torch.float32)
    if not torch.allclose(basis, known.key_matrix[0], rtol=0, atol=1e-6):
        raise ValueError("the file has another Hadamard rotation than this steno")
    return TransformedSegment(inner=inner, basis=known)


def build_segment(
    name: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], *, num_kv_heads: int, head_dim: int
) -> Segment:
    """A stored segment; raises `DamagedFile` if it fits no form, or not this model's heads."""
    try:
        form = _BY_NAME.get(name.removeprefix(ROTATED))
        if form is None:
            raise ValueError(f"this steno knows no segments of the form {name!r}")
        segment = form.build(fields, tensors, num_kv_heads, head_dim)
        return _in_rotation(segment, tensors["basis"], head_dim) if name.startswith(ROTATED) else segment
    except (KeyError, TypeError, ValueError, BadArgument) as error:
        raise DamagedFile(f"a segment cannot be read: {str(error)[:300]}.") from None


def _int(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError(f"{value!r} is no count")
    return value


def _offsets(value: Any, num_heads: int) -> tuple[int, ...]:
    offsets = tuple(_int(x) for x in value)
    if len(offsets) != num_heads + 1 or offsets[0] or tuple(sorted(offsets)) != offsets:
        raise ValueError(f"the offsets of {num_heads} heads must be {num_heads + 1} that begin with 0 and never fall")
    return offsets


def expect(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """x itself; raises ValueError if it is another matrix."""
    if tuple(x.shape) != tuple(shape) or (dtype is not None and x.dtype != dtype):
        raise ValueError(f"a matrix must be {dtype or 'float'} {[*shape]}; got {x.dtype} {[*x.shape]}")
    return x


def _counts(tensors: Mapping[str, Tensor], num_rows: int, columns: int = 1) -> Tensor | None:
    if "log_counts" not in tensors:
        return None
    expect(tensors["log_counts"], (num_rows, columns), torch.float32)
    return tensors["log_counts"].reshape(-1)
