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
from steno.methods import COMPOSITIONS, METHODS, NAMED, describe_methods
from steno.recipe import parse_recipe

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    # as a part of `benchmarks`, so that nothing in that folder passes for an installed package
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(f"benchmarks.{name}")
    finally:
        sys.path.remove(str(ROOT))


recipes, methods = load("result_recipes"), load("methods_page")


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


def test_papers_of_several_stages_and_shipped_weights_are_measured() -> None:
    known, left_out = recipes.entries()
    shown = {entry.shows for entry in known if entry.shows is not None}
    assert {name for kind, name in shown if kind == recipes.RECIPE} == {*NAMED, *COMPOSITIONS}
    assert {"locret", "trim_kv", "prefixkv", "hylra"} <= {name for _, name in shown}
    assert left_out.keys() == {"videollm_mod"}
    assert "trained" in left_out["videollm_mod"]
    whole = [entry for entry in known if entry.shows == (recipes.RECIPE, "ems")]
    assert [entry.text for entry in whole] == [f"ems @ {budget}" for budget in recipes.BUDGETS]
    assert {entry.form for entry in whole} == {"ems"}
    assert {entry.form for entry in known if entry.shows == ("merge", "ems")} == {"snapkv | ems"}


PREFILLS = [
    {"recipe": "snapkv @ 25%", "layers": 4, "compress_s": 0.04, "overhead_full_percent": 6.2},
    {"recipe": "int4", "layers": 30, "compress_s": 0.1, "overhead_full_percent": -1.6},
]


def methods_table(found: list[Row]) -> dict[tuple[str, str, str], list[str]]:
    """The cells behind kind, name and recipe of each line."""
    lines = [line for line in methods.page(found, PREFILLS).split("\n") if line.startswith("| ")][2:]
    cells = [[cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")] for line in lines]
    return {(kind, name, form.replace("\0", "|")): rest for kind, name, form, *rest in cells}


def test_the_measured_methods() -> None:
    found = [
        example_row(name, task, context, scores=10 * scores, kl=kl, top1_agreement=0.9, bits_per_value=bits,
                    decode_ms_per_token=30.0 + context / 1024)
        for name, scores, kl, bits in (
            ("full", [1.0, 1.0], 0.0, 16.0), ("snapkv @ 25%", [0.0, 1.0], 0.25, 4.0), ("snapkv @ 12.5%", [0.0, 0.0], 0.5, 2.0),
            ("int4", [1.0, 1.0], 0.01, 4.5), ("kvzip | one_threshold(unit=64) | int4 @ 12.5% of bytes", [1.0, 1.0], 0.02, 2.0),
            ("ems @ 50%", [1.0, 0.0], 0.1, 8.0), ("fastkv | snapkv @ 50%", [1.0, 0.0], 0.1, 8.0),
        )
        for task in recipes.TASKS
        for context in recipes.CONTEXTS
    ]  # fmt: skip
    table = methods_table(found)
    described = describe_methods()
    assert {(kind, name) for kind, name, _ in table} == {(row["kind"], f"`{row['id']}`") for row in described}
    assert all(len(cells) == 3 + 6 for cells in table.values())
    paper, sees, trained, *cells = table["score", "`snapkv`", "`snapkv`"]
    assert (paper, sees, trained) == ("[2404.14469](https://arxiv.org/abs/2404.14469), 2024", "queries", "no")
    share = 50  # what an example row holds where it is not said
    assert cells == [
        "-",
        f"0.50, KL 0.250, 90%<br>4.00 bits, {share}%, 31 ms",
        f"0.00, KL 0.500, 90%<br>2.00 bits, {share}%, 31 ms",
        "-", "0.30", "+6 %",
    ]  # fmt: skip
    assert table["quantize", "`int4`", "`int4`"][3:] == [
        "-", "-", "-", f"1.00, KL 0.010, 90%<br>4.50 bits, {share}%, 31 ms", "0.10", "-2 %",
    ]  # fmt: skip
    assert table["recipe", "`ems`", "`ems`"][3].startswith("0.50, KL 0.100")
    assert table["merge", "`ems`", "`snapkv | ems`"][3:] == ["-"] * 6
    assert table["propagate", "`fastkv`", "`fastkv | snapkv`"][3] != "-"
    assert table["recipe", "`fastkv`", "`fastkv`"][3] == "-"
    assert table["merge", "`evict`", "-"][3:] == ["-"] * 6
    assert len([1 for _, name, _ in table if name == "`kivi`"]) == 4
    at_bytes = table["quantize", "`int4`", f"`{recipes.AT_BYTES.partition(' @ ')[0].format(id='int4')}`, of bytes"]
    assert at_bytes[3:] == ["-", "-", f"1.00, KL 0.020, 90%<br>2.00 bits, {share}%, 31 ms", "-", "-", "-"]


def test_numbers_that_are_not_there_are_dashes() -> None:
    found = [example_row("keydiff @ 50%", "niah", 512, decode_ms_per_token=None, scores=20 * [1.0])]
    assert methods_table(found)["score", "`keydiff`", "`keydiff`"][3] == "1.00, KL -, -<br>16.00 bits, 50%, -"
    assert all(cells[3:7] == ["-"] * 4 for cells in methods_table([]).values())
    assert "No rows are measured yet" in methods.page([], [])


def test_the_command_writes_its_part_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append_row(tmp_path / "bench-x.jsonl", example_row("int4", "niah", 512))
    document = tmp_path / "methods.md"
    words = ["--results", str(tmp_path), "--document", str(document)]
    monkeypatch.setattr(sys, "argv", ["methods_page.py", *words])
    document.write_text("Before.\n\n<!-- measured -->\nstale\n<!-- /measured -->\n\nAfter.\n")
    methods.main()
    text = document.read_text()
    assert text.startswith("Before.\n\n<!-- measured -->\n")
    assert text.endswith("<!-- /measured -->\n\nAfter.\n")
    assert "stale" not in text
    methods.main()
    assert document.read_text() == text
    document.write_text("no place")
    with pytest.raises(SystemExit, match="1"):
        methods.main()
    assert "<!-- measured -->" in capsys.readouterr().err


def rows(*names: str) -> list[Row]:
    return [example_row(name, task, 512) for name in names for task in recipes.TASKS]


def render(results: Any, found: list[Row], tmp_path: Path) -> str:
    return str(results.page(found, "figures", tmp_path))


@pytest.fixture
def results() -> Any:
    pytest.importorskip("altair", reason="the extra `bench` is not installed")
    pytest.importorskip("vl_convert", reason="the extra `bench` is not installed")
    return load("results_page")


def test_the_page_of_rows(results: Any, tmp_path: Path) -> None:
    found = rows("full", "snapkv @ 25%", "peer:kvpress:snapkv@25%")
    text = render(results, found, tmp_path)
    assert f"18 of at most {2 * sum(len(recipes.wanted(task)) for task in recipes.TASKS)} rows:" in text
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
    assert render(results, found, tmp_path) == text
    assert (tmp_path / "results-512.svg").read_bytes() == first


def test_shares_of_the_bytes_have_a_table_of_their_own(results: Any, tmp_path: Path) -> None:
    recipe = recipes.AT_BYTES.format(id="int4", budget="12.5%")
    assert recipe in [entry.text for entry in recipes.wanted("niah")]
    assert recipe not in [entry.text for entry in recipes.wanted("questions")]
    text = render(results, rows("full", "snapkv @ 25%", recipe), tmp_path)
    tokens, _, of_bytes = text.partition("## Three budgets in bytes")
    line = next(line for line in of_bytes.splitlines() if line.startswith("| `kvzip"))
    assert [cell.strip() == "-" for cell in line.replace("\\|", "").split("|")[2:-1]] == [
        True,
        True,
        False,
        *[True] * 3,
    ]
    assert "KL" in line
    assert "% of bytes" not in tokens
    assert "`snapkv`" not in of_bytes
    assert (tmp_path / "results-budgets-bytes.svg").exists()


def test_the_last_of_rows_that_measure_the_same_counts(results: Any, tmp_path: Path) -> None:
    found = rows("full", "int4")
    again = [example_row("int4", task, 512, scores=[0.0] * 20) for task in recipes.TASKS]
    assert "| `int4` | 0.00 (0.00 to 0.04) |" in render(results, found + again, tmp_path)


def test_a_recipe_without_all_tasks_is_not_pooled(results: Any, tmp_path: Path) -> None:
    text = render(results, [*rows("full"), example_row("int4", "niah", 512)], tmp_path)
    pooled, _, single = text.partition("## Task by task")
    assert "`int4`" not in pooled.partition("## 512 tokens")[2]
    assert "| `int4` |" in single


def test_without_rows_it_says_how_to_get_them(
    results: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["results_page.py", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        results.main()
    assert "make results-rows" in capsys.readouterr().err


def test_the_command_writes_the_page(results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in rows("full", "int4"):
        append_row(tmp_path / "bench-x.jsonl", row)
    document = tmp_path / "results.md"
    words = ["--results", str(tmp_path), "--document", str(document), "--figures", str(tmp_path / "figures")]
    monkeypatch.setattr(sys, "argv", ["results_page.py", *words])
    results.main()
    assert "](figures/results-512.svg)" in document.read_text()
