"""The benchmarks: the report of their rows, the forms of SDPA they compare with, the batches they decode, what they read once."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import steno
import tiny
from steno.errors import RecipeError

ROOT = Path(__file__).parents[1]
TEXT = "# By hand\n\n<!-- kernels -->\nold\n<!-- /kernels -->\n\nBetween.\n\n<!-- decode -->\n<!-- /decode -->\nEnd.\n"


def script(name: str) -> ModuleType:
    # by its path: with benchmarks/ on sys.path, its kernels.py would be found where transformers looks for a package
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / f"benchmarks/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the scripts put it in order for themselves


def kernel_row(contender: str, median_s: float, **fields: object) -> dict[str, object]:
    return {
        "cpu": "Some CPU", "gpu": None, "date": "2026-01-02", "torch": "2", "isa": "avx2", "case": "batch", "rows": 8,
        "tokens": 4096, "queries": 1, "contender": contender, "shared": False, "threads": 1, "repeats": 9,
        "kv_bytes": 10**6, "median_s": median_s, "low_s": median_s * 0.9, "high_s": median_s * 1.1,
        "read_bytes_per_s": 1e10, "bandwidth_share": 0.5, "threads_speedup": None, "compute_speedup": None,
        "shared_speedup": None, "speedup_fastest": 1.0, "speedup_gqa": 2.0,
    } | fields  # fmt: skip


def decode_row(contender: str, context: int, median_s: float) -> dict[str, object]:
    return {
        "cpu": "Some CPU", "threads": 2, "date": "2026-01-03", "torch": "2", "model": "m", "contender": contender, "batch": 1,
        "context": context, "tokens": context, "median_s": median_s, "low_s": median_s, "high_s": median_s,
        "tokens_per_s": 1 / median_s, "kv_bytes": 2 * 10**6, "others_load": None,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    rows = [
        kernel_row("sdpa bf16, enable_gqa", 0.004),
        kernel_row("steno int4", 0.009),
        kernel_row("steno int4", 0.001),
    ]
    rows += [kernel_row("sdpa bf16, enable_gqa", 0.02, queries=4, case="queries")]
    (folder / "kernels-cpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [decode_row("a | b @ 50%", 1024, 0.1), decode_row("a | b @ 50%", 8192, 0.3)]
    rows += [{key: rows[0][key] for key in ("cpu", "threads", "date", "torch", "model", "contender", "batch")}
             | {"context": 4096, "skipped": "needs 99 GB"}]  # fmt: skip
    (folder / "decode-cpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_parts_are_written_and_the_rest_stays(results: Path, tmp_path: Path) -> None:
    text = script("report").render(TEXT, results, tmp_path / "figures", "figures")
    assert "old" not in text
    assert text.startswith("# By hand\n\n<!-- kernels -->\n")
    assert "\n<!-- /kernels -->\n\nBetween.\n\n<!-- decode -->\n" in text
    assert text.endswith("\n<!-- /decode -->\nEnd.\n")
    assert "| steno int4 | 1 | 1.0 | 1.00 [0.90, 1.10] |" in text
    assert "9.00" not in text, "a later row of the same measurement counts"
    assert "| a \\| b @ 50% | 100.0 | 300.0 | 3.00 |" in text
    assert "needs 99 GB" in text


def test_writing_again_changes_nothing(results: Path, tmp_path: Path) -> None:
    report, figures = script("report"), tmp_path / "figures"
    once = report.render(TEXT, results, figures, "figures")
    pictures = {path.name: path.read_bytes() for path in figures.glob("*")}
    assert report.render(once, results, figures, "figures") == once
    assert {path.name: path.read_bytes() for path in figures.glob("*")} == pictures


def test_pictures_are_drawn_and_shown(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = script("report").render(TEXT, results, tmp_path / "figures", "figures")
    for name in ("kernels", "decode"):
        assert f"![{name}](figures/{name}.svg)" in text
        assert "</svg>" in (tmp_path / "figures" / f"{name}.svg").read_text()


def test_what_is_missing_is_left_with_a_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("report").render(TEXT, tmp_path, tmp_path, ".") == TEXT
    assert "kernels: no rows" in capsys.readouterr().err


def test_text_without_markers_is_left_with_a_notice(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("report").render("<!-- kernels -->", results, tmp_path, ".") == "<!-- kernels -->"
    assert "<!-- /kernels -->" in capsys.readouterr().err


def test_the_document_has_every_marker() -> None:
    text, report = (ROOT / "docs/performance.md").read_text("utf-8"), script("report")
    assert all(report.replaced(text, name, "x") is not None for name in report.PARTS)


@pytest.mark.parametrize("queries", [1, 4])
def test_the_three_forms_of_sdpa_compute_the_same(queries: int) -> None:
    script("kernels")
    from benchmarks.attention_contenders import Case, Heads

    heads = Heads(kv_heads=2, group=3, head_dim=16, device="cpu", isa=None, footprint=1)
    case = Case(name="x", rows=2, tokens=64, queries=queries)
    first, *others = (contender.copies[0]().flatten() for contender in heads.sdpa(case, "fp32", torch.float32, False))
    for other in others:
        torch.testing.assert_close(other, first)


def test_shared_rows_are_the_same_spans() -> None:
    script("kernels")
    from benchmarks.attention_contenders import Case, dense_table

    case, k = Case(name="x", rows=3, tokens=64), torch.randn(3, 2, 64, 16)
    shared, apart = dense_table(case, k[:1], k[:1]), dense_table(case, k, k)
    assert shared.num_rows == apart.num_rows == 3
    assert shared.rows[2][1][0] is shared.rows[0][1][0]
    assert apart.rows[2][1][0].keys.data_ptr() != apart.rows[0][1][0].keys.data_ptr()


def test_rows_are_compared_with_sdpa_of_the_same_threads() -> None:
    rows = [
        kernel_row("sdpa bf16, enable_gqa", 0.08),
        kernel_row("sdpa bf16, group as tokens", 0.02),
        kernel_row("steno int4", 0.01),
        kernel_row("sdpa bf16, enable_gqa", 0.04, threads=2),
        kernel_row("steno int4", 0.008, threads=2),
    ]
    script("kernels").against_sdpa(rows)
    assert [row["speedup_fastest"] for row in rows] == pytest.approx([0.25, 1, 2, 1, 5])
    assert [row["speedup_gqa"] for row in rows] == pytest.approx([1, 4, 8, 1, 5])


@pytest.mark.parametrize(
    "contender", ["full", "int4 @ 100%", "snapkv | adakv | kivi(bits=4) @ 50%", "DynamicCache float32"]
)
def test_rows_are_copied_into_memory_of_their_own(contender: str) -> None:
    decode = script("decode")
    ours = contender not in decode.HOSTS
    model, ids = tiny.build("llama"), tiny.prompt(300)
    model.set_attn_implementation("steno" if ours else "sdpa")
    lm = SimpleNamespace(model=model)
    single = decode.read(lm, contender, ids)
    alone = decode.kv_bytes(single)
    batch = decode.repeated(contender, single, model.config, 3)
    assert decode.kv_bytes(batch) >= 0.99 * 3 * alone
    with torch.inference_mode():
        together = model(ids[:, -1:].repeat(3, 1), past_key_values=batch).logits
        expected = model(ids[:, -1:], past_key_values=single).logits
    # queries are rounded for int4, and what falls on a border goes either way
    torch.testing.assert_close(together, expected.expand(3, -1, -1), atol=5e-3, rtol=0)


def test_a_batch_beyond_the_free_memory_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = script("decode")
    model = tiny.build("llama")
    model.set_attn_implementation("steno")
    ids, lm = tiny.prompt(100), SimpleNamespace(model=model)
    single = decode.read(lm, "full", ids)
    monkeypatch.setattr(decode, "free_bytes", lambda: 2 * single.kv_bytes)
    request = decode.Request(configuration="", prompts=[], steps=2, threads=1, hf_folder="", gguf_folder="")
    row = decode.measure(lm, "full", single, ids, 1, request)
    assert (row["tokens"], row["steps"]) == (100, 2)
    assert row["low_s"] <= row["median_s"] <= row["high_s"]
    with pytest.raises(decode.Skipped, match="GB of memory"):
        decode.measure(lm, "full", single, ids, 2, request)


@pytest.mark.parametrize("recipe", ["full", "int4", "kvzip | adakv | int8 @ 60%", "shorthand @ 50%"])
def test_what_was_read_once_is_compressed_as_if_read_for_the_recipe(tmp_path: Path, recipe: str) -> None:
    eighth = script("eighth")
    lm = steno.load(tiny.save_with_bytes(tmp_path / "llama", "llama"), dtype="fp32")
    document = "The key is under the third stone, says the note. " * 6
    read = eighth.Read.of(lm, document)
    for _ in range(2):  # what was read is not used up
        mine, plain = read.under(recipe), lm.read(document, recipe)
        assert str(mine.cache.recipe) == recipe
        assert mine.cache.kv_bytes == plain.cache.kv_bytes
        assert mine.cache.kv_bytes_full == plain.cache.kv_bytes_full
        assert mine.cache.held_tokens() == plain.cache.held_tokens()
        ids = lm.tokenize(" And so on, and so forth.")
        assert torch.equal(eighth.forced(mine, ids), eighth.forced(plain, ids))


def test_only_what_is_seen_can_be_compared(tmp_path: Path) -> None:
    eighth = script("eighth")
    lm = steno.load(tiny.save_with_bytes(tmp_path / "llama", "llama"), dtype="fp32")
    read = eighth.Read.of(lm, "The key is under the third stone.")
    with pytest.raises(RecipeError, match="sees more than keys, values and the replay"):
        read.under("snapkv @ 20")


def test_rows_of_texts_become_one_line() -> None:
    eighth = script("eighth")
    rows = [
        {"recipe": r, "kind": k, "seed": 0, "index": i, "kv_bytes": held, "kv_bytes_full": 100}
        | ({"right": right[i]} if k == "number" else {"kl": 0.01 * i if held < 100 else 0.0, "agreed": 1.0})
        for r, held, right in (("full", 100, [True] * 4), ("int4", 30, [True, True, False, True]))
        for k in ("number", "text")
        for i in range(4)
    ]
    line = eighth.summary("int4", rows)
    assert "30.00% of the bytes" in line
    assert "3 of 4 found" in line
    assert "full 4 (difference -0.250" in line
    assert "KL 0.0150" in line
    assert "largest of 4 texts 0.0300" in line


def test_measuring_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eighth = script("eighth")
    lm = steno.load(tiny.save_with_bytes(tmp_path / "llama", "llama"), dtype="fp32")
    asked: list[int] = []

    def one(lm: steno.LanguageModel, index: int, count: int, seed: int) -> tuple[Any, Any]:
        asked.append(index)
        return eighth.Read.of(lm, "The key is under the third stone. " * 9), lambda context: {"right": index > 0}

    monkeypatch.setitem(eighth.KINDS, "number", one)
    path = tmp_path / "rows.jsonl"
    first = eighth.measure_all(lm, "number", 2, 0, ["full", "int4"], path)
    assert asked == [0, 1]
    assert [row["right"] for row in first] == [False, False, True, True]
    assert eighth.measure_all(lm, "number", 2, 0, ["full", "int4"], path) == first
    assert len(eighth.measure_all(lm, "number", 2, 0, ["full", "int8"], path)) == 4
    assert asked == [0, 1, 0, 1]
    assert len(path.read_text("utf-8").splitlines()) == 6
