"""The command line: what it prints, what it refuses, and with which exit status."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from steno import session
from steno.cli.main import run
from steno.methods import COMPOSITIONS, METHODS, NAMED, describe_methods
from steno.version import VERSION

TEXT = "the hen is here. " * 5
ASK_FIELDS = {
    "answer", "model", "recipe", "prompt_tokens", "new_tokens", "kv_bytes_full", "kv_bytes", "kv_bytes_peak",
    "prefill_s", "ttft_s", "decode_tok_per_s",
}  # fmt: skip
METHOD_FIELDS = {
    "id", "kind", "title", "paper", "year", "arxiv", "needs", "frees_memory", "trained", "differs", "parameters",
}  # fmt: skip


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def arguments(tiny_folder: Path, document: Path) -> list[str]:
    return ["ask", "he?", "--model", str(tiny_folder), "--document", str(document), "--max-new-tokens", "5"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"steno {VERSION}\n"


@pytest.mark.parametrize("argv", [[], ["nothing"], ["ask"], ["ask", "q", "--max-new-tokens", "many"]])
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: steno")


def test_methods_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in METHODS)
    assert run(["methods", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)
    assert [method["id"] for method in methods] == [*METHODS, *NAMED, *COMPOSITIONS]
    assert all(set(method) == METHOD_FIELDS for method in methods)


def test_the_list_of_methods_says_how_to_see_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods"]) == 0
    said, example = capsys.readouterr().out.splitlines()[-1].split(": steno ")
    assert "differs from its paper" in said
    assert run(example.split()) == 0
    assert METHODS[example.split()[-1]].differs[:20] in capsys.readouterr().out


@pytest.mark.parametrize("columns", [20, 70, 1000])
@pytest.mark.parametrize("row", describe_methods(), ids=lambda row: f"{row['kind']}-{row['id']}")
def test_all_about_a_method(
    row: dict[str, Any], columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run(["methods", row["id"]]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= max(columns, 60)
    pages = [" ".join(page.split()) for page in out.split("\n\n")]
    is_recipe = row["kind"] == "recipe"
    (page,) = (
        page for page in pages if page.startswith(f"{row['id']}, {'a named recipe' if is_recipe else row['kind']} ")
    )
    assert f"{'stands for' if is_recipe else 'title'} {row['title']} paper {row['paper']}, {row['year']} " in page
    assert f"differs {row['differs']} parameters " in page
    assert (f" address https://arxiv.org/abs/{row['arxiv']} sees " in page) == bool(row["arxiv"])
    assert (
        f" trained {'yes' if row['trained'] else 'no'} frees memory {'yes' if row['frees_memory'] else 'no'} " in page
    )
    assert all(need.lower().replace("_", " ") in page for need in row["needs"])
    of_stage = [f"{name}={value!r}" for name, value in row["parameters"].items()]
    assert all(text in page for text in (row["parameters"] if is_recipe else of_stage))
    assert page.endswith(" parameters none") == (not row["parameters"])


def test_parameters_come_with_their_units_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "snapkv", "keyformer", "vidkv_stp"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "parameters window=64 tokens: Last tokens of the prompt" in page
    assert "recent_share=0.3 of the budget: Share of the budget" in page
    assert "tau_init=1.0: Temperature while" in page  # described in one line with another
    assert "tau_end=2.0: Temperature while" in page
    assert "residual=128: As in `vidkv`." in page


def test_methods_by_name_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "look_m", "kivi", "shorthand", "kivi", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["id"], row["kind"]) for row in found] == [
        ("look_m", "merge"), ("look_m", "recipe"), ("kivi", "quantize"), ("shorthand", "recipe"),
    ]  # fmt: skip
    assert all(row in describe_methods() for row in found)
    assert found[2]["parameters"] == {"bits": 2, "group": 32, "residual": 128}


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_unknown_methods_are_one_line_with_the_nearest(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "kivi", "SNAPKB", "shorthnd", "qqq", *more]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error == (
        "steno: error: unknown method 'SNAPKB'; did you mean 'snapkv'? unknown method 'shorthnd'; did you mean 'shorthand'? "
        f"unknown method 'qqq'; `steno methods` lists the {len(METHODS) + len(COMPOSITIONS)} valid ones.\n"
    )


RECIPES = [
    "full", "int8", "snapkv(window=8) | adakv | int4 @ 50%", "streaming_llm @ 20", "ems @ 80%", "look_m @ 80%", "vidkv_stp",
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_ask_json(arguments: list[str], recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments, "--recipe", recipe, "--json"]) == 0
    out, _ = capsys.readouterr()
    result = json.loads(out)
    assert set(result) >= ASK_FIELDS
    assert result["recipe"] == recipe
    assert 0 < result["new_tokens"] <= 5
    assert 0 < result["kv_bytes"] <= result["kv_bytes_peak"]


def test_ask_with_weights_in_fewer_bits(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments, "--recipe", "full", "--weights", "int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "int8"
    assert run([*arguments, "--recipe", "full", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] is None


def test_ask_prints_the_answer_and_a_table(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments, "--recipe", "int8"]) == 0
    out = capsys.readouterr().out
    assert "memory held" in out
    assert "time to first token" in out


def test_compare_with_itself_is_no_difference(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments, "--recipe", "full", "--compare", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["answer"] == result["full_answer"]
    assert result["kl_first_token"] == pytest.approx(0, abs=1e-9)
    assert result["equal_tokens_share"] == 1.0


def test_compare_shows_both_answers(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments, "--recipe", "streaming_llm @ 8", "--compare"]) == 0
    out = capsys.readouterr().out
    assert "with the full cache:" in out
    assert "KL of the first token" in out


def test_document_from_standard_input(arguments: list[str], capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    arguments[arguments.index("--document") + 1] = "-"
    assert run([*arguments, "--recipe", "full", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--recipe", "snapvk @ 20%"], "did you mean 'snapkv'?"),
        (["--recipe", "snapkv(windw=8) @ 20%"], "did you mean 'window'?"),
        (["--recipe", "snapkv | tova @ 20%"], "at most one score stage"),
        (["--recipe", "int4 | snapkv @ 20%"], "write `snapkv | int4`"),
        (["--recipe", "snapkv @ 0"], "budget"),
        (["--recipe", "snapkv @ 0.2"], "never a bare ratio"),
        (["--recipe", "snapkv @ 40"], "always keeps 64"),
        (["--recipe", "snapkv"], "needs a budget"),
        (["--document", "no-such-file"], "no such file"),
        (["--model", "no-such-model"], "unknown model"),
        (["--model", "./no/such/folder"], "no such file or folder"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be >= 1"),
        (["--max-new-tokens", "100"], "more than the 128 positions"),
        (["--temperature", "-1"], "`temperature` must be >= 0"),
        (["--dtype", "int3"], "dtype"),
        (["--weights", "int3"], "`weights` must name a format"),
    ],
)
def test_bad_input_is_one_line_and_2(
    arguments: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments, *change]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("steno: error: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b" \n\t ", "empty"), (b"\xff\xfe\x00binary", "not text in UTF-8"), (b"a\0b", "not text")],
)
def test_bad_documents(
    arguments: list[str], document: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    document.write_bytes(content)
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_budget_above_the_prompt_is_said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments, "--recipe", "keydiff @ 5000", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "nothing was dropped" in err
    assert json.loads(out)["kv_bytes"] > 0


def test_interrupt_ends_cleanly(arguments: list[str], capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "load", interrupt)
    assert run(arguments) == 130
    assert capsys.readouterr().err.strip().endswith("interrupted; nothing was changed.")
