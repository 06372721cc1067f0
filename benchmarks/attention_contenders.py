"""What `kernels.py` lets compete: calls of torch SDPA and of steno's attention over the same tokens in every format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from steno.kernels.attention import DenseSpan, PageSpan, SpanTable, attend
from steno.kernels.quant import Pages, encode_pages
from steno.types import PAGE_TOKENS, PageFormat

Step = Callable[[], object]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {
    "int8": PageFormat(bits=8),
    "int4": PageFormat(bits=4),
    "kivi int4 g32": PageFormat(bits=4, key_group=32, value_group=32),
    "int2": PageFormat(bits=2),
    "kivi int2 g32": PageFormat(bits=2, key_group=32, value_group=32),
}
GQA = "sdpa bf16, enable_gqa"


@dataclass(frozen=True, kw_only=True)
class Case:
    """B rows of S tokens and T new ones each; with `prefix_shared` every format is measured apart and shared."""

    name: str
    rows: int
    tokens: int
    queries: int = 1
    threads: tuple[int, ...] = (1,)
    prefix_shared: tuple[bool, ...] = (False,)

    def __str__(self) -> str:
        return f"{self.name}: {self.rows} x {self.tokens:,} tokens, T = {self.queries}, threads {self.threads}"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to compute a case: a call for each copy of the cache, and the bytes that one copy holds."""

    name: str
    kv_bytes: int
    copies: list[Step]
    shared: bool = False


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The shape of the heads, where attention runs, and how many bytes its contenders cycle through."""

    kv_heads: int
    group: int
    head_dim: int
    device: str
    isa: str | None
    footprint: int

    @property
    def impl(self) -> str:
        return "triton" if self.device == "cuda" else "cpu"

    def random_kv(self, case: Case, dtype: torch.dtype, shared: bool) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, S, D]`, of one row only where the rows share it."""
        shape = (1 if shared else case.rows, self.kv_heads, case.tokens, self.head_dim)
        k, v = (torch.randn(shape, device=self.device, dtype=dtype) for _ in range(2))
        return k, v

    def num_copies(self, num_bytes: int) -> int:
        return max(2, -(-self.footprint // num_bytes))

    def contenders(self, case: Case) -> Iterator[Contender]:
        for shared in case.prefix_shared:
            for label, dtype in DTYPES.items():
                yield from self.sdpa(case, label, dtype, shared)
            for label, dtype in DTYPES.items():
                k, v = self.random_kv(case, dtype, shared)
                num_bytes = k.nbytes + v.nbytes
                tables = [dense_table(case, k.clone(), v.clone()) for _ in range(self.num_copies(num_bytes))]
                yield self.steno(case, label, num_bytes, tables, shared)
            k, v = (x.view(-1, PAGE_TOKENS, self.head_dim) for x in self.random_kv(case, torch.bfloat16, shared))
            for label, fmt in FORMATS.items():
                pages = encode_pages(k, v, fmt)
                tables = [page_table(case, self.kv_heads, pages) for _ in range(self.num_copies(pages.nbytes))]
                yield self.steno(case, label, pages.nbytes, tables, shared)

    def steno(self, case: Case, label: str, num_bytes: int, tables: list[SpanTable], shared: bool) -> Contender:
        q = torch.randn(
            case.rows, self.kv_heads * self.group, case.queries, self.head_dim, dtype=torch.bfloat16, device=self.device
        )
        scale = self.head_dim**-0.5
        copies: list[Step] = [lambda t=t: attend(q, t, scale=scale, impl=self.impl, isa=self.isa) for t in tables]
        return Contender(name=f"steno {label}", kv_bytes=num_bytes, copies=copies, shared=shared)

    def sdpa(self, case: Case, label: str, dtype: torch.dtype, shared: bool) -> Iterator[Contender]:
        """Three ways to give SDPA grouped queries: its own, repeated keys, and the group as query tokens."""
        k, v = self.random_kv(case, dtype, shared)
        num_bytes = k.nbytes + v.nbytes
        copies = [
            tuple(x.clone().expand(case.rows, -1, -1, -1) for x in (k, v)) for _ in range(self.num_copies(num_bytes))
        ]
        shape = (case.rows, self.kv_heads * self.group, case.queries, self.head_dim)
        q = torch.randn(shape, dtype=dtype, device=self.device)
        grouped = q.reshape(case.rows, self.kv_heads, self.group * case.queries, self.head_dim)
        mask = stacked = None
        if case.queries > 1:  # the last token of the context is the last of the queries
            mask = torch.ones(case.queries, case.tokens, dtype=torch.bool, device=self.device)
            mask = mask.tril(case.tokens - case.queries)
            stacked = mask.repeat(self.group, 1)
        ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "enable_gqa": lambda k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
            "heads repeated": lambda k, v: scaled_dot_product_attention(
                q, k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1), attn_mask=mask
            ),
            "group as tokens": lambda k, v: scaled_dot_product_attention(grouped, k, v, attn_mask=stacked),
        }
        for way, call in ways.items():
            steps: list[Step] = [lambda kv=kv, call=call: call(*kv) for kv in copies]
            yield Contender(name=f"sdpa {label}, {way}", kv_bytes=num_bytes, copies=steps, shared=shared)


def dense_table(case: Case, k: Tensor, v: Tensor) -> SpanTable:
    """Over k, v `[B, Hkv, S, D]`, or `[1, Hkv, S, D]` that all rows share: then the same spans stand in every row."""
    rows = [[[DenseSpan(k[b, h], v[b, h])] for h in range(k.shape[1])] for b in range(len(k))]
    return SpanTable.build(rows if len(rows) == case.rows else rows * case.rows, head_dim=k.shape[-1])


def page_table(case: Case, kv_heads: int, pages: Pages) -> SpanTable:
    """The same over a copy of `pages`, which hold the heads one after the other."""
    codes = {name: getattr(pages, name).clone() for name in ("key_codes", "value_codes", "key_params", "value_params")}
    copy = Pages(fmt=pages.fmt, head_dim=pages.head_dim, **codes)
    per_head = case.tokens // PAGE_TOKENS
    spans = [PageSpan(copy[i : i + per_head]) for i in range(0, copy.num_pages, per_head)]
    rows = [[[span] for span in spans[i : i + kv_heads]] for i in range(0, len(spans), kv_heads)]
    return SpanTable.build(rows if len(rows) == case.rows else rows * case.rows, head_dim=pages.head_dim)
