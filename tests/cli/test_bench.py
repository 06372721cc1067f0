"""`steno bench` as a person calls it, with a tiny model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from steno.bench.peers import Peers
from steno.bench.rows import read_rows
from steno.cli import benching
from steno.cli.main import run
from tiny import save_with_bytes

SHORT = ["--context", "500", "--samples", "2"]
TWO = ["--recipe", "full", "--recipe", "int4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_bytes(tmp_path_factory.mktemp("bench") / "tiny", "llama", positions=2000)


@pytest.fixture
def bench(folder: Path) -> Any:
    """Runs the command on the tiny model; the exit status."""
    return lambda *words: run(["bench", "--model", str(folder), "--dtype", "float32", *map(str, words)])


def test_rows_report_and_json(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*TWO, *SHORT, "--task", "niah", "--out", tmp_path / "out", "--json") == 0
    streams = capsys.readouterr()
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert [json.loads(line) for line in streams.out.splitlines()] == [asdict(row) for row in rows]
    assert [row.recipe for row in rows] == ["full", "int4"]
    assert "2/2 niah 500 unseen: score" in streams.err
    assert "# Recipes on" in (tmp_path / "out" / "report.md").read_text()
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    assert bench(*TWO, *SHORT, "--task", "niah", "--out", tmp_path / "out") == 2
    assert "has rows already: go on with --resume" in capsys.readouterr().err
    assert bench(*TWO, *SHORT, "--task", "niah", "--out", tmp_path / "out", "--resume") == 0
    said = capsys.readouterr().err
    assert "2 rows are there already, 0 are left" in said
    assert "has all rows" in said
    (tmp_path / "out" / "report.md").unlink()
    assert bench(*TWO, *SHORT, "--task", "niah", "--out", tmp_path / "out", "--resume") == 0
    assert "report.md" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.md").exists()
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == before
    assert bench(*TWO, *SHORT, "--task", "niah", "--seed", "1", "--out", tmp_path / "out", "--resume") == 2
    assert "rows of another run (row 1: seed 0 instead of 1)" in capsys.readouterr().err


def test_recipes_that_look_at_images_are_measured_on_text(bench: Any, tmp_path: Path) -> None:
    recipes = ["text_prior @ 50%", "look_m @ 50%", "vidkv_stp"]
    words = [word for recipe in recipes for word in ("--recipe", recipe)]
    assert bench(*words, *SHORT, "--task", "niah", "--task", "perplexity", "--out", tmp_path / "out") == 0
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert sorted((row.recipe, row.task) for row in rows) == sorted(product(recipes, ("niah", "perplexity")))
    assert all(row.kv_bytes < row.kv_bytes_full for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "nia"], "unknown task 'nia'; did you mean 'niah'?"),
        (["--recipe", "snap @ 20%"], "unknown method 'snap'"),
        (["--context", "2001"], "2001 tokens is longer than tiny, which has 2000 positions"),
        (["--samples", "0"], "`samples` must be >= 1"),
        (["--task", "jsonl:no.jsonl"], "no such file: no.jsonl"),
        (["--against", "no.jsonl"], "no such file: no.jsonl"),
        (["--recipe", "snapkv @ 1%", "--context", "500"], "a budget of 1%"),
        (["--peer", "kvpres:snapkv@25%"], "unknown peer 'kvpres'; did you mean 'kvpress'?"),
        (["--peer", "kvpress:snapkv@25%", "--ray"], "give --peer or --ray, not both"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert bench(*words, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert message in error
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_a_broken_line_is_told_with_file_and_number(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"context": "a", "question": "b", "answers": ["c"]}\n{"context": \n')
    assert bench("--task", f"jsonl:{own}", "--out", tmp_path / "out") == 2
    assert f"{own}, line 2: not JSON" in capsys.readouterr().err
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "rows.jsonl").write_text("{\n")
    assert bench(*TWO, *SHORT, "--resume", "--out", tmp_path / "out") == 2
    assert "rows.jsonl, line 1: not JSON" in capsys.readouterr().err
    assert (tmp_path / "out" / "rows.jsonl").read_text() == "{\n"


def test_against_an_earlier_run(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old"
    assert bench(*TWO, *SHORT, "--task", "niah", "--seed", "7", "--out", old) == 0
    capsys.readouterr()
    # what to measure is taken from the file
    assert bench("--against", old / "rows.jsonl", "--out", tmp_path / "new") == 0
    told = capsys.readouterr().out
    assert "2 rows compared, 2 of them instance by instance: " in told
    assert not any(what in told for what in ("score", "KL", "bytes"))
    rows = [json.loads(line) for line in (old / "rows.jsonl").read_text().splitlines()]
    smaller = "".join(json.dumps(row | {"kv_bytes": row["kv_bytes"] // 2}) + "\n" for row in rows)
    (tmp_path / "smaller.jsonl").write_text(smaller)
    assert bench("--against", tmp_path / "smaller.jsonl", "--resume", "--out", tmp_path / "new") == 1
    assert "worse  niah, 500 tokens, question unseen, int4: bytes held" in capsys.readouterr().out
    assert bench("--against", old / "rows.jsonl", *SHORT, "--recipe", "int8", "--out", tmp_path / "other") == 2
    assert "nothing to compare" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_left_out(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benching, "Peers", partial(Peers, tmp_path / "none"))
    words = ["--recipe", "full", *SHORT, "--peer", "kvpress:snapkv@25%", "--peer", "kvpress:tova@25%"]
    assert bench(*words, "--out", tmp_path / "out") == 0
    assert (
        capsys.readouterr().err.count("kvpress is not installed, its rows are left out; in a checkout: make peers") == 1
    )
    assert [row.recipe for row in read_rows(tmp_path / "out" / "rows.jsonl")] == ["full"]


def test_the_list_of_tasks_names_each_once(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--task", "xyz", "--out", tmp_path / "out") == 2
    names = capsys.readouterr().err.strip().rpartition("valid: ")[2].rstrip(".").split(", ")
    assert len(names) == len(set(names)) > 10


def test_ctrl_c_keeps_what_is_done(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*TWO, "--recipe", "int8", *SHORT, "--task", "niah", "--out", tmp_path / "out"]

    def interrupted(*args: Any) -> Any:
        for number, row in enumerate(real(*args)):
            yield row
            if number == 1:
                raise KeyboardInterrupt

    real = benching.run
    with monkeypatch.context() as patch:
        patch.setattr(benching, "run", interrupted)
        assert bench(*words) == 130
    assert "interrupted; 2 rows (2 new)" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.md").exists()
    assert bench(*words, "--resume") == 0
    assert [row.recipe for row in read_rows(tmp_path / "out" / "rows.jsonl")] == ["full", "int4", "int8"]


def test_a_killed_process_loses_only_the_row_in_work(bench: Any, folder: Path, tmp_path: Path) -> None:
    words = ["--model", str(folder), *TWO, "--task", "niah", "--task", "perplexity", "--task", "niah_single_1", *SHORT]
    command = [sys.executable, "-m", "steno", "bench", *words, "--dtype", "float32", "--out", str(tmp_path / "out")]
    rows = tmp_path / "out" / "rows.jsonl"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        for _ in range(1200):
            if process.poll() is not None or (rows.exists() and rows.read_text().count("\n") >= 2):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    done = read_rows(rows)
    assert 2 <= len(done) <= 6
    assert bench(*words[2:], "--out", tmp_path / "out", "--resume") == 0
    finished = read_rows(rows)
    assert finished[: len(done)] == done
    assert len({row.cell for row in finished}) == len(finished) == 6


def test_two_at_a_time_in_one_folder_are_refused(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / "rows.jsonl.lock"):
        assert bench(*TWO, *SHORT, "--out", tmp_path / "out") == 2
    assert "another bench is writing to" in capsys.readouterr().err


def test_without_a_cluster_ray_says_so(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert bench(*TWO, *SHORT, "--ray", "--out", tmp_path / "out") == 2
    assert "pip install 'stenokv[ray]'" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_of_a_cluster_of_two_are_the_same(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.cluster_utils import Cluster

    words = [*TWO, "--recipe", "snapkv(window=16) @ 40%", *SHORT, "--task", "niah", "--task", "niah_single_1"]
    assert bench(*words, "--out", tmp_path / "here") == 0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        assert bench(*words, "--ray", cluster.address, "--out", tmp_path / "there") == 0
        half = tmp_path / "half"
        half.mkdir()
        lines = (tmp_path / "there" / "rows.jsonl").read_text().splitlines(keepends=True)
        (half / "rows.jsonl").write_text("".join(lines[:4]))
        assert bench(*words, "--ray", cluster.address, "--resume", "--out", half) == 0
    finally:
        cluster.shutdown()
    here, there, resumed = (
        {row.cell: row for row in read_rows(tmp_path / d / "rows.jsonl")} for d in ("here", "there", "half")
    )
    assert len(here) == 6
    assert here.keys() == there.keys() == resumed.keys()
    same = ("instances", "scores", "scores_full", "kv_bytes", "kv_bytes_peak", "kv_bytes_full", "samples", "model_hash")
    for cell, row in here.items():
        for other in (there[cell], resumed[cell]):
            assert {name: getattr(other, name) for name in same} == {name: getattr(row, name) for name in same}
            assert other.kl == pytest.approx(row.kl, rel=1e-3)
    capsys.readouterr()
    assert bench(*words, "--ray", "127.0.0.1:1", "--out", tmp_path / "none") == 2
    assert "no Ray cluster at '127.0.0.1:1'" in capsys.readouterr().err
