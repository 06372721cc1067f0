"""Which implementation runs, and what happens where one is missing."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from steno.errors import BadArgument, KernelError, StenoWarning
from steno.kernels import native, triton_runtime
from steno.kernels.attention import DenseSpan, SpanTable, attend, dispatch

needs_native = pytest.mark.skipif(not native.available_isas(), reason="the native library is not built")


@pytest.fixture
def call():
    table = SpanTable.build([[[DenseSpan(torch.randn(70, 16), torch.randn(70, 16))]]], head_dim=16)
    return torch.randn(1, 2, 1, 16), table


@pytest.fixture
def library_dir(tmp_path, monkeypatch):
    """An empty folder in place of the one with the library."""
    monkeypatch.setattr(native, "LIBRARY_DIR", tmp_path)
    dispatch._warn_once.cache_clear()
    yield tmp_path
    dispatch._warn_once.cache_clear()


def test_missing_library_warns_once_and_is_still_right(call, library_dir):
    q, table = call
    expected = attend(q, table, scale=0.5, impl="naive")
    with pytest.warns(StenoWarning, match="slower.*not compiled.*install a C\\+\\+ compiler"):
        out, lse = attend(q, table, scale=0.5)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(q, table, scale=0.5)


def test_missing_library_by_name_is_an_error(call, library_dir):
    q, table = call
    with pytest.raises(KernelError, match="not compiled"):
        attend(q, table, scale=0.5, impl="cpu")
    with pytest.raises(KernelError, match="not compiled"):
        attend(q, table, scale=0.5, isa="portable")
    assert native.available_isas() == []


def test_damaged_library_counts_as_missing(call, library_dir):
    q, table = call
    (library_dir / "_native.so").write_bytes(b"not a library")
    with pytest.raises(KernelError, match="does not load"):
        attend(q, table, scale=0.5, impl="cpu")


@needs_native
def test_library_of_another_version_counts_as_missing(call, tmp_path, monkeypatch):
    q, table = call
    (tmp_path / "_native.so").symlink_to(native.library()._name)
    monkeypatch.setattr(native, "LIBRARY_DIR", tmp_path)
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    with pytest.raises(KernelError, match="interface version"):
        attend(q, table, scale=0.5, impl="cpu")


@needs_native
def test_missing_instruction_set_is_an_error(call, monkeypatch):
    q, table = call
    monkeypatch.setattr(native, "ISAS", (*native.ISAS, "amx"))
    with pytest.raises(KernelError, match="'amx' is not available"):
        attend(q, table, scale=0.5, isa="amx")


def test_cuda_tensors_go_to_triton_where_it_is_installed(monkeypatch):
    q = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    monkeypatch.setattr(triton_runtime, "why_missing", lambda: None)
    assert dispatch._choose(q, asked=False) == "triton"
    assert dispatch._choose(SimpleNamespace(device=q.device, dtype=torch.float64), asked=False) == "naive"
    monkeypatch.setattr(triton_runtime, "why_missing", lambda: "triton does not import")
    dispatch._warn_once.cache_clear()
    with pytest.warns(StenoWarning, match="plain torch.*triton does not import"):
        assert dispatch._choose(q, asked=False) == "naive"


def test_fp64_queries_run_in_fp64(call):
    q, table = call
    out, _ = attend(q.double(), table, scale=0.5)
    assert out.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "cpi"}, "did you mean 'cpu'"),
        ({"isa": "avx511"}, "did you mean 'avx512'"),
        ({"q": torch.randn(2, 2, 1, 16)}, r"q must be \[1, a multiple of 1, T, 16\]"),
        ({"q": torch.randn(1, 2, 1, 8)}, "q must be"),
    ],
)
def test_bad_arguments_are_refused(call, change, message):
    q, table = call
    with pytest.raises(BadArgument, match=message):
        attend(change.pop("q", q), table, scale=0.5, **change)


@needs_native
@pytest.mark.parametrize("page", [-1, 2])
def test_page_ids_outside_the_span_are_refused(call, page):
    q, table = call
    with pytest.raises(BadArgument, match="page ids must lie within"):
        attend(q, table.with_page_ids({0: torch.tensor([0, page], dtype=torch.int32)}), scale=0.5, impl="cpu")
