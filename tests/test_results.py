"""docs/results.md: which recipes it is made of, and the page from rows."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bench.example_rows import example_row
from steno.bench.peers import PeerMethod
from steno.bench.rows import Row, append_row
from steno.methods import METHODS
from steno.recipe import parse_recipe

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    # as a part of `benchmarks`, so that nothing in that folder passes for an installed package
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(f"benchmarks.{name}")
    finally:
        sys.path.remove(str(ROOT))


recipes, results = load("result_recipes"), load("results_page")


def test_every_method_is_measured_or_named_as_left_out() -> None:
    known, left_out = recipes.entries()
    stages = {stage.id for entry in known if not entry.is_peer for stage in parse_recipe(entry.text).stages}
    defaults = {name for name, forms in recipes.FORMS.items() if not forms}
    assert stages | set(left_out) | defaults == set(METHODS)
    assert not stages & defaults


def test_entries_are_canonical_and_each_once() -> None:
    known, _ = recipes.entries()
    texts = [entry.text for entry in known]
    assert len(set(texts)) == len(texts) > 60
    for entry in known:
        assert str(PeerMethod.parse(entry.text) if entry.is_peer else parse_recipe(entry.text)) == entry.text
        assert (entry.budget is None) == ("@" not in entry.text)


def test_what_is_no_recipe_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipes.FORMS, "int4", ("tova | int4 @ {budget}",))
    _, left_out = recipes.entries()
    assert "evicts single tokens" in left_out["int4"]


def rows(*names: str) -> list[Row]:
    return [example_row(name, task, 512) for name in names for task in recipes.TASKS]


def render(found: list[Row], tmp_path: Path) -> str:
    return str(results.page(found, "figures", tmp_path))


@pytest.fixture(autouse=True)
def charts() -> Any:
    pytest.importorskip("altair", reason="the extra `bench` is not installed")
    pytest.importorskip("vl_convert", reason="the extra `bench` is not installed")


def test_the_page_of_rows(tmp_path: Path) -> None:
    found = rows("full", "snapkv @ 25%", "peer:kvpress:snapkv@25%")
    text = render(found, tmp_path)
    assert "**Not complete**: 18 of at most" in text
    assert "What these numbers do not show" in text
    assert "| `snapkv @ 25%` |" in text
    assert "| `kvpress:snapkv@25%` (peer) |" in text
    assert "## 512 tokens" in text
    assert "## 1,024 tokens" not in text
    scores = [
        score for row in found for score in row.scores if row.recipe == "snapkv @ 25%" and row.task in recipes.NEEDLES
    ]
    assert f"| `snapkv @ 25%` | {sum(scores) / len(scores):.2f} (" in text
    assert all(name in (tmp_path / "results-512.svg").read_text() for name in ("kvpress:snapkv@25%", "full cache"))
    first = (tmp_path / "results-512.svg").read_bytes()
    assert render(found, tmp_path) == text
    assert (tmp_path / "results-512.svg").read_bytes() == first


def test_the_last_of_rows_that_measure_the_same_counts(tmp_path: Path) -> None:
    found = rows("full", "int4")
    again = [example_row("int4", task, 512, scores=[0.0] * 20) for task in recipes.TASKS]
    assert "| `int4` | 0.00 (0.00 to 0.04) |" in render(found + again, tmp_path)


def test_a_recipe_without_all_tasks_is_not_pooled(tmp_path: Path) -> None:
    text = render([*rows("full"), example_row("int4", "niah", 512)], tmp_path)
    pooled, _, single = text.partition("## Task by task")
    assert "`int4`" not in pooled.partition("## 512 tokens")[2]
    assert "| `int4` |" in single


def test_without_rows_it_says_how_to_get_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["results_page.py", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        results.main()
    assert "make results-rows" in capsys.readouterr().err


def test_the_command_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in rows("full", "int4"):
        append_row(tmp_path / "bench-x.jsonl", row)
    document = tmp_path / "results.md"
    words = ["--results", str(tmp_path), "--document", str(document), "--figures", str(tmp_path / "figures")]
    monkeypatch.setattr(sys, "argv", ["results_page.py", *words])
    results.main()
    assert "](figures/results-512.svg)" in document.read_text()
