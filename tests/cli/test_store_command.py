"""The store on the command line: put, ls, ask --store, get, verify, gc."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steno.cli.ask import DEFAULT_RECIPE
from steno.cli.main import run
from tiny import save_with_bytes

TEXT = "The hen is here; the fox is there. " * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_bytes(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def call(place: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    document = tmp_path / "text.txt"
    document.write_text(TEXT)

    def call(*argv: str, status: int = 0) -> list[dict[str, Any]]:
        reads = argv[0] in ("put", "get")
        more = [str(document), "--model", str(model), "--dtype", "fp32"] if reads else []
        assert run(["store", argv[0], *more, *argv[1:], "--store", str(place), "--json"]) == status
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


def test_what_the_default_recipe_makes_can_be_stored_and_saved(
    call: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [told] = call("put")
    assert told["stored_tokens"] == 0
    assert call("put")[0]["stored_tokens"] == told["tokens"]
    document, out, machine = tmp_path / "text.txt", tmp_path / "a.steno", ["--model", str(model), "--dtype", "fp32"]
    assert run(["read", str(document), "--out", str(out), *machine]) == 0
    capsys.readouterr()
    assert run(["ask", "he?", "--context", str(out), "--max-new-tokens", "5", "--json", *machine]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == DEFAULT_RECIPE


def test_what_was_put_is_listed_asked_and_got(call: Any, place: Path, model: Path, tmp_path: Path, capsys: Any) -> None:
    [told] = call("put", "--recipe", "int4")
    assert told["stored_tokens"] == 0
    assert len(told["entries"]) == told["tokens"] // 256 + 1
    assert call("put", "--recipe", "int4")[0]["stored_tokens"] == told["tokens"]
    rows = call("ls")
    assert {row["name"] for row in rows} == {*told["entries"]}
    assert {row["recipe"] for row in rows} == {"full", "int4"}
    assert {row["tokens"] for row in rows} == {256, told["tokens"]}
    assert run(["store", "ls", "--store", str(place)]) == 0
    assert f"{len(rows)} entries" in capsys.readouterr().out
    out = tmp_path / "text.steno"
    call("get", "--recipe", "int4", "--out", str(out))
    ask = ["ask", "he?", "--model", str(model), "--dtype", "fp32", "--max-new-tokens", "5", "--json"]
    assert run([*ask, "--context", str(out)]) == 0
    from_file = json.loads(capsys.readouterr().out)
    stored = ["--document", str(tmp_path / "text.txt"), "--recipe", "int4", "--store", str(place)]
    assert run([*ask, *stored]) == 0
    from_store = json.loads(capsys.readouterr().out)
    assert from_store["stored_tokens"] == told["tokens"]
    assert from_store["answer"] == from_file["answer"]
    assert run([x for x in [*ask, *stored] if x != "--json"]) == 0
    assert "from the store" in capsys.readouterr().out


def test_what_is_not_there_cannot_be_got(call: Any, tmp_path: Path) -> None:
    out = tmp_path / "text.steno"
    call("put", "--recipe", "full")
    call("get", "--recipe", "int4", "--out", str(out), status=1)
    call("get", "--recipe", "full", "--tenant", "other", "--out", str(out), status=1)
    assert not out.exists()
    call("get", "--recipe", "full", "--out", str(out))
    assert out.exists()


def test_damage_is_told_and_removed(call: Any, place: Path) -> None:
    told = call("put", "--recipe", "full")[0]
    assert all(row["ok"] for row in call("verify"))
    path = next(place.rglob(told["entries"][0]))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    rows = call("verify", status=1)
    assert [row["name"] for row in rows if not row["ok"]] == told["entries"][:1]
    call("verify", "--remove", status=1)
    assert call("gc")[0]["unreachable"] == sorted(told["entries"][1:])
    assert call("ls") == []
    assert call("verify") == []


def test_the_quota_and_pins(call: Any, place: Path) -> None:
    told = call("put", "--recipe", "int4", "--pin")[0]
    assert all(row["pinned"] for row in call("ls"))
    assert call("gc", "--quota", "1kB")[0]["over_quota"] == []
    call("put", "--recipe", "int4", "--unpin")
    assert {*call("gc", "--quota", "1kB")[0]["over_quota"]} == {*told["entries"]}
    call("put", "--recipe", "int4", "--quota", "1kB", status=1)


def test_sealed_entries(call: Any, place: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    key = tmp_path / "key"
    key.write_bytes(bytes(32))
    call("put", "--key-file", str(key), status=2)  # anybody can read it
    key.chmod(0o600)
    call("put", "--recipe", "int4", "--key-file", str(key))
    assert all(row["ok"] for row in call("verify", "--key-file", str(key)))
    assert not any(row["ok"] for row in call("verify", status=1))
    assert b"STENOX" in next(place.rglob("*.context")).read_bytes()[:8]


@pytest.mark.parametrize(
    "argv",
    [
        ["store", "ls", "--store", "nonsense://x"],
        ["store", "ls", "--store", "no/such/store"],
        ["store", "gc", "--quota", "12"],
        ["store", "gc", "--quota", "much"],
        ["store", "put", "no-such-file"],
        ["ask", "q", "--tenant", "t"],
    ],
    ids=" ".join,
)
def test_wrong_input(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argv) == 2
    assert capsys.readouterr().err.startswith("steno: error: ")
