"""The Triton kernels: what only they do. On a CPU they run through Triton's interpreter, so everything here is small."""

import os
import subprocess
import sys

import pytest
import torch
from implementations import HAS_TRITON, TRITON_DEVICE, needs_triton, run, table_on
from torch.nn.functional import scaled_dot_product_attention

from steno.errors import BadArgument, KernelError
from steno.kernels import triton_runtime
from steno.kernels.attention import DenseSpan, PageSpan, SpanTable, attend
from steno.kernels.quant import decode_pages, encode_pages
from steno.types import PageFormat

if HAS_TRITON:
    from steno.kernels.attention import triton as kernels

pytestmark = needs_triton


def random_kv(*shape, seed=0):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).unbind()


def mixed_table(head_dim=80, tail=70, seed=0):
    """Two heads of different lengths: pages of two formats, then a tail with room."""
    formats = [PageFormat(bits=4), PageFormat(bits=2, key_group=32, value_group=48)]
    rows = [
        [[PageSpan(encode_pages(*random_kv(n, 64, head_dim, seed=seed + n), fmt)) for fmt in formats] for n in (5, 2)]
    ]
    for head in rows[0]:
        head.append(DenseSpan(*(x.bfloat16() for x in random_kv(tail, head_dim, seed=seed + len(head)))))
    return SpanTable.build(rows, head_dim=head_dim)


@pytest.mark.parametrize("num_programs", [1, 3, 100])
def test_any_cut_of_the_context_gives_the_same(num_programs):
    q, table = torch.randn(1, 4, 2, 80), mixed_table()
    expected = attend(q, table, scale=0.2, impl="naive")
    moved = table_on(table, TRITON_DEVICE)
    found = kernels.attend(q.to(TRITON_DEVICE), moved, scale=0.2, num_programs=num_programs)
    assert len(moved.plan.items) == {1: 6, 3: 8, 100: 18}[num_programs]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-5, atol=5e-6)


def test_more_parts_than_are_merged_at_a_time():
    keys, values = random_kv(20 * 64, 16)
    keys[:, 0] = torch.linspace(0, 10, 20 * 64)
    table = table_on(SpanTable.build([[[DenseSpan(keys, values)]]], head_dim=16), TRITON_DEVICE)
    q = torch.eye(16)[:1, None, None].to(TRITON_DEVICE)  # the logits rise along the tokens
    found = kernels.attend(q, table, scale=0.5, num_programs=20)
    assert len(table.plan.items) == 20
    for x, y in zip(found, attend(q, table, scale=0.5, impl="naive"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(("group", "num_queries", "head_dim"), [(16, 1, 256), (2, 64, 64)])
def test_more_rows_than_a_block(group, num_queries, head_dim):
    keys, values = random_kv(100, head_dim)
    table = SpanTable.build([[[DenseSpan(keys.half(), values.half())]]], head_dim=head_dim)
    q = torch.randn(1, group, num_queries, head_dim)
    for x, y in zip(run("triton", q, table, scale=0.1), attend(q, table, scale=0.1, impl="naive"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=5e-6)


def test_new_tail_lengths_keep_the_plan():
    q, table = torch.randn(1, 4, 1, 80).to(TRITON_DEVICE), table_on(mixed_table(), TRITON_DEVICE)
    plans = []
    for length in (70, 3, 0, 65):
        table.set_tail_lengths([length])
        out, _ = attend(q, table, scale=0.2, impl="triton")
        torch.testing.assert_close(out, attend(q, table, scale=0.2, impl="naive")[0], rtol=1e-5, atol=5e-6)
        plans.append(table.plan)
    assert all(plan is plans[0] for plan in plans)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_of_short_dtypes_is_at_most_twice_that_of_sdpa(dtype):
    pages = encode_pages(*random_kv(6, 64, 64), PageFormat(bits=4))
    table = SpanTable.build([[[PageSpan(pages)]]], head_dim=64)
    q = torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact, _ = attend(q.double(), table, scale=0.5, causal=False, impl="naive")
    k, v = (x.reshape(1, 1, -1, 64) for x in decode_pages(pages, dtype))
    usual = scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)
    out, _ = run("triton", q, table, scale=0.5, causal=False)
    assert out.dtype == dtype
    assert (out - exact).abs().max() <= 2 * (usual - exact).abs().max()


def test_page_ids_outside_the_span_are_passed_over():
    q, table = torch.randn(1, 4, 1, 80), mixed_table()
    ids = {0: torch.tensor([4, -1, 5, 0], dtype=torch.int32), 2: torch.tensor([2, 1], dtype=torch.int32)}
    right = {0: torch.tensor([4, 0], dtype=torch.int32), 2: torch.tensor([1], dtype=torch.int32)}
    expected, _ = attend(q, table.with_page_ids(right), scale=0.2, impl="naive")
    out, _ = run("triton", q, table.with_page_ids(ids), scale=0.2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=5e-6)


def test_what_the_kernels_cannot_read_is_refused():
    q, table = torch.randn(1, 4, 1, 80), mixed_table()
    with pytest.raises(BadArgument, match="fp32, bf16 or fp16 queries"):
        run("triton", q.double(), table, scale=1.0)
    elsewhere = torch.device("meta")
    with pytest.raises(BadArgument, match="got one on meta"):
        attend(q.to(elsewhere), table, scale=1.0, impl="triton")
    codes = torch.zeros(1 + 64 * 80, dtype=torch.uint8)[1:]
    shifted = PageSpan(encode_pages(*random_kv(1, 64, 80), PageFormat(bits=8)))
    object.__setattr__(shifted.pages, "key_codes", codes[None])
    with pytest.raises(BadArgument, match="multiple of 16 bytes"):
        run("triton", q, SpanTable.build([[[shifted], []]], head_dim=80), scale=1.0)


def test_triton_by_name_is_an_error_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(triton_runtime, "why_missing", lambda: "it is not here")
    with pytest.raises(KernelError, match="missing: it is not here"):
        attend(torch.randn(1, 4, 1, 80), mixed_table(), scale=1.0, impl="triton")


COMPILE = """
import ast, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from steno.kernels.attention.triton import _attend_kernel, _merge_kernel
from steno.kernels.quant.triton import _decode_kernel, _encode_kernel

TYPES = {
    "q": "*bf16", "out": "*bf16", "keys": "*bf16", "values": "*bf16", "key_codes": "*u32", "value_codes": "*u32",
    "key_params": "*fp16", "value_params": "*fp16", "entries": "*i64", "items": "*i32", "item_offsets": "*i32",
    "part_out": "*fp32", "part_best": "*fp32", "part_total": "*fp32", "lse": "*fp32", "scale": "fp32", "softcap": "fp32",
}
capability, D, D_PAD, KINDS = ast.literal_eval(sys.argv[1])
QUANT = dict(D=D, BITS=4, KEY_GROUP=32, VALUE_GROUP=16, D_PAD=D_PAD)
# Triton makes integers that are 1 constants too
CASES = [
    (_attend_kernel, dict(D=D, D_PAD=D_PAD, BLOCK_M=16, PAGES=4, KINDS=KINDS, CAUSAL=True, HAS_SOFTCAP=True, num_queries=1)),
    (_merge_kernel, dict(D=D, D_PAD=D_PAD, num_rows=1)),
    (_encode_kernel, dict(**QUANT, VALUE_GROUP_PAD=16, key_channel_stride=1, value_channel_stride=1)),
    (_decode_kernel, QUANT),
]
for kernel, constants in CASES:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": 8, "num_stages": 2}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(kernel.__name__, len(compiled.asm["cubin"]))
"""


PAGED_AND_TAIL = ((-1, 4, 64, 16, True), (1, 0, 0, 0, True))
ALL_KINDS = (*PAGED_AND_TAIL, (0, 0, 0, 0, False), (2, 0, 0, 0, True), (-1, 8, 32, 80, True), (-1, 2, 16, 48, True))


@pytest.mark.parametrize(
    "case",  # capability, D, D to the next power of two, kinds of spans
    [(80, 20, 32, PAGED_AND_TAIL), pytest.param((90, 80, 128, ALL_KINDS), marks=pytest.mark.slow)],
    ids=["sm_80", "sm_90"],
)
def test_the_kernels_compile_for_gpus_that_are_not_here(case):
    # what the interpreter does not see: types that differ between branches, sizes that a GPU cannot hold
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE, repr(case)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [int(line.split()[1]) > 0 for line in done.stdout.splitlines()] == [True] * 4
