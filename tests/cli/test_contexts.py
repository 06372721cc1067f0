"""Saved contexts on the command line: read, info, verify, ask --context."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steno.cli.main import run

TEXT = "the hen is here. " * 5


@pytest.fixture
def saved(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    document, path = tmp_path / "text.txt", tmp_path / "text.steno"
    document.write_text(TEXT)
    argv = ["read", str(document), "--out", str(path), "--model", str(tiny_folder), "--recipe", "int4", "--json"]
    assert run(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file_bytes"] == path.stat().st_size
    assert told["recipe"] == "int4"
    return path


def test_asking_a_saved_context_is_asking_the_document(saved: Path, tiny_folder: Path, capsys) -> None:
    argv = ["ask", "he?", "--model", str(tiny_folder), "--max-new-tokens", "5", "--json"]
    assert run([*argv, "--context", str(saved)]) == 0
    from_file = json.loads(capsys.readouterr().out)
    assert run([*argv, "--document", str(saved.with_suffix(".txt")), "--recipe", "int4"]) == 0
    from_text = json.loads(capsys.readouterr().out)
    for name in ("answer", "recipe", "prompt_tokens", "new_tokens", "kv_bytes_full"):
        assert from_file[name] == from_text[name]


def test_only_a_saved_context_is_replaced(saved: Path, tiny_folder: Path, capsys) -> None:
    document = saved.with_suffix(".txt")
    argv = ["read", str(document), "--model", str(tiny_folder), "--recipe", "int4", "--out"]
    assert run([*argv, str(saved)]) == 0
    capsys.readouterr()
    for out in (document, saved.parent):
        assert run([*argv, str(out)]) == 2
        error = capsys.readouterr().err
        assert str(out) in error
        assert error.count("\n") == 1
    assert document.read_text() == TEXT


def test_info_and_verify_need_no_model(saved: Path, capsys) -> None:
    assert run(["info", str(saved), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"]["name"] == "tiny-llama"
    assert told["recipe"] == "int4"
    assert told["file_bytes"] == saved.stat().st_size
    assert run(["info", str(saved)]) == 0
    assert "int4" in capsys.readouterr().out
    assert run(["verify", str(saved)]) == 0
    assert "whole" in capsys.readouterr().out


def test_verify_tells_which_file_is_damaged(saved: Path, tmp_path: Path, capsys) -> None:
    damaged = tmp_path / "damaged.steno"
    data = bytearray(saved.read_bytes())
    data[60] ^= 1  # of the header
    damaged.write_bytes(data)
    assert run(["verify", str(saved), str(damaged), "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["ok"] for line in lines] == [True, False]
    assert "digest" in lines[1]["error"]
    assert run(["info", str(damaged)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("steno: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", [["--document", "a.txt"], ["--recipe", "int4"], ["--compare"]])
def test_a_context_brings_its_own_document_and_recipe(saved: Path, option: list[str], capsys) -> None:
    assert run(["ask", "he?", "--context", str(saved), *option]) == 2
    assert option[0] in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told(tiny_folder: Path, saved: Path, capsys) -> None:
    argv = ["read", str(saved.with_suffix(".txt")), "--model", str(tiny_folder), "--recipe", "int4"]
    assert run([*argv, "--out", str(saved / "below.steno")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert run(["info", str(saved.with_name("none.steno"))]) == 2
