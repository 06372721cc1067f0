"""What the report says, and what a person with a browser sees of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from example_rows import RECIPES, example_row, example_rows

from steno.bench.report.markdown import markdown
from steno.bench.report.verdict import command, front, means, verdict
from steno.bench.report.write import can_draw, write_report
from steno.cli.main import parser

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
SMALL = "kvzip | adakv | kivi(bits=4) @ 50%"


def test_the_front_is_what_nothing_beats() -> None:
    costs = {"a": (1, 0.2), "b": (2, 0.2), "c": (3, 0.9), "d": (3, 0.8), "e": (4, 0.9), "f": (5, 1.0)}
    rows = [example_row(name, "niah", 512, kv_bytes=cost, score=score) for name, (cost, score) in costs.items()]
    assert [row.recipe for row in front(rows, lambda row: row.kv_bytes)] == ["a", "c", "f"]
    assert front(rows, lambda row: None) == []


def test_verdict_names_the_smallest_without_a_visible_loss() -> None:
    text = " ".join(verdict(example_rows()))
    assert f"Smallest memory without a loss that could be shown: `{SMALL}`" in text
    assert "A loss beyond chance shows in `snapkv(window=16) @ 25%`" in text
    assert re.search(r"With 20 instances a task a loss of up to 0\.\d\d can hide", text)
    worst = [row for row in example_rows() if row.recipe != SMALL]
    assert verdict(worst) == ["Every recipe that was measured loses against the full cache on some task."]
    assert "No recipe beside" in verdict([row for row in example_rows() if row.recipe == "full"])[0]


def test_means_leave_out_what_was_not_measured_everywhere() -> None:
    rows = [*example_rows(), example_row("int4", "niah", 1024)]
    assert [mean.recipe for mean in means(rows)] == [SMALL, "snapkv(window=16) @ 25%", "full"]
    # a run that was interrupted after the full cache of its next task
    assert means([*rows, example_row("full", "questions", 1024)]) == means(rows)


def test_the_command_of_the_report_can_be_parsed() -> None:
    import shlex

    words = shlex.split(command(example_rows()))
    assert words[0] == "steno"
    arguments = parser().parse_args(words[1:])
    assert arguments.recipe == list(RECIPES)
    assert (arguments.task, arguments.context) == (["niah", "perplexity", "stress"], [1024, 2048])
    assert (arguments.samples, arguments.seed, arguments.protocol) == (20, 0, ["unseen"])


def test_markdown_has_every_row_and_keeps_its_columns() -> None:
    lines = markdown(example_rows()).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == 4 * (2 + 3)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {16}
    assert "## niah, 1,024 tokens, question unseen" in lines
    assert "## perplexity, 1,024 tokens" in lines


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not can_draw():
        pytest.skip("the extra `bench` (altair, vl-convert-python) is not installed")
    rows = example_rows()
    rows.append(example_row("full", "jsonl:</script><b>x", 700, sized=False))
    markdown_file, html_file = write_report(tmp_path_factory.mktemp("report"), rows)
    assert markdown_file.exists()
    return html_file


def test_the_page_is_one_small_file_that_asks_for_nothing(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert len(text.encode()) < 5_000_000
    found: list[tuple[str, str | None]] = []
    seeker = HTMLParser()
    seeker.handle_starttag = lambda tag, attrs: found.extend([(tag, ""), *attrs])  # type: ignore[method-assign]
    seeker.feed(text)
    assert [value for name, value in found if name in ("src", "href")] == ["data:,"]
    assert ("b", "") not in found
    assert sum(name == "script" for name, _ in found) == 3


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    page = open_page(browser, report)
    yield page
    page.context.close()


def open_page(browser: Any, report: Path, **options: Any) -> Any:
    """The report in a new window without a network; any error or request fails the test."""
    page = browser.new_context(offline=True, **options).new_page()
    page.on("pageerror", lambda error: pytest.fail(f"the page raised {error}"))
    page.on("console", lambda message: message.type == "error" and pytest.fail(f"the page logged {message.text}"))
    page.on(
        "request", lambda request: request.url.startswith(("file:", "data:")) or pytest.fail(f"asked for {request.url}")
    )
    page.goto(report.as_uri())
    drawn(page)
    return page


def drawn(page: Any) -> None:
    page.wait_for_selector("body[data-drawn=true]", timeout=60_000)


def table(page: Any) -> list[list[str]]:
    """Text of the table's cells."""
    return page.eval_on_selector_all(
        "#rows-table tbody tr", "rows => rows.map(r => [...r.cells].map(c => c.innerText))"
    )


def box(page: Any, name: str) -> Any:
    """The first filter whose label contains a name."""
    return page.get_by_role("checkbox", name=name).first


def points(page: Any, place: str) -> int:
    """Points that the first chart of a place shows."""
    return page.locator(f"#{place} .card").first.locator("g.mark-symbol path").count()


def test_a_click_on_a_filter_changes_table_and_charts(page: Any) -> None:
    assert len(table(page)) == 13
    assert points(page, "overall") == 3
    assert "Means over 4 groups" in page.locator("#overall-note").inner_text()
    box(page, "jsonl:").uncheck()
    drawn(page)
    assert len(table(page)) == 12
    assert points(page, "overall") == 3
    assert page.locator("#tasks .card").count() == 8
    assert page.locator("#needles .card").count() == 3
    box(page, "snapkv").uncheck()
    box(page, "stress").uncheck()
    drawn(page)
    shown = table(page)
    assert len(shown) == 6
    assert not any("snapkv" in row[0] or row[1] == "stress" for row in shown)
    assert points(page, "overall") == points(page, "tasks") == 2
    assert page.locator("#tasks .card").count() == 6
    assert page.locator("#needles .card h3").all_inner_texts() == ["full", SMALL]
    assert page.locator("#count").inner_text() == "6 of 13 rows"
    box(page, "snapkv").check()
    drawn(page)
    assert len(table(page)) == 9


def test_the_front_is_drawn(page: Any) -> None:
    box(page, "jsonl:").uncheck()
    drawn(page)
    line = page.locator("#overall .card").first.locator("g.mark-line path")
    assert line.count() == 1
    # one step: the smallest recipe scores highest of all, so the front goes straight to the right
    heights = re.findall(r"[ML]-?[\d.]+,(-?[\d.]+)", line.get_attribute("d"))
    assert len(heights) > 1
    assert len(set(heights)) == 1


def test_heat_map_shows_each_cell(page: Any) -> None:
    chart = page.locator("#needles .card").first
    assert chart.locator("g.mark-rect path").count() == 10 * 2
    assert "50%" in chart.inner_text()


def test_the_table_sorts_and_searches_from_the_keyboard(page: Any) -> None:
    held = [row[10] for row in table(page)]
    page.get_by_role("button", name="Held, MB").focus()
    page.keyboard.press("Enter")
    assert [row[10] for row in table(page)] == sorted(held, key=float)
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("Held")
    page.keyboard.press("Enter")
    assert [row[10] for row in table(page)] == sorted(held, key=float, reverse=True)
    page.locator("#search").focus()
    page.keyboard.type("KVZIP")
    drawn(page)
    assert len(table(page)) == 4
    box(page, "full").focus()
    page.keyboard.press("Space")
    assert not box(page, "full").is_checked()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_runs_out_of_the_screen(browser: Any, report: Path, scheme: str) -> None:
    page = open_page(browser, report, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    colors = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    light = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors]
    assert (light[0] > light[1]) == (scheme == "light")
    label = page.locator("#overall text").first
    fill = page.evaluate("node => getComputedStyle(node).fill", label.element_handle())
    assert (sum(map(int, re.findall(r"\d+", fill)[:3])) < 380) == (scheme == "light")
    page.context.close()
