"""Peers in the bench: their text form, and a real worker of transformers' own cache, run by this Python."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

import steno
from steno.bench.peers import CHECKOUT, PROJECTS, PeerError, PeerMethod, Peers
from steno.bench.plan import plan_groups
from steno.bench.rows import Row
from steno.bench.run import Bench, run, todo
from steno.bench.summary import Subject
from steno.errors import BadArgument

WORKERS = CHECKOUT / "benchmarks" / "peers"


def quiet(tokens: int) -> None:
    pass


def environment(folder: Path, project: str) -> None:
    """An environment whose Python is this one."""
    python = folder / project / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    os.chmod(python, 0o755)


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    folder = tmp_path_factory.mktemp("peers")
    environment(folder, "transformers")
    with Peers(folder, WORKERS) as found:
        yield found


@pytest.fixture(scope="module")
def bench(lm: steno.LanguageModel, peers: Peers) -> Bench:
    return Bench(subject=Subject.of(lm, "tiny", 3), peers=peers)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("kvpress:snapkv@25%", "kvpress:snapkv@25%"),
        ("kvpress: kvzip @ 12.5%", "kvpress:kvzip@12.5%"),
        ("transformers:quanto4", "transformers:quanto4"),
    ],
)
def test_text_form(text: str, shown: str) -> None:
    method = PeerMethod.parse(text)
    assert str(method) == shown
    assert method.recipe == f"peer:{shown}"
    assert PeerMethod.parse(shown) == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kvpres:snapkv@25%", "unknown peer 'kvpres'; did you mean 'kvpress'"),
        ("kvpress:snapkw@25%", "unknown method 'snapkw' of kvpress; did you mean 'snapkv'"),
        ("kvpress:snapkv", "kvpress needs a share of the prompt: write `kvpress:snapkv@25%`"),
        ("transformers:quanto4@50%", "transformers takes no share"),
        ("kvpress:snapkv@100", "a share of the prompt below 100%, such as 25%; got 100"),
        ("kvpress:snapkv@100%", "a share of the prompt below 100%"),
        ("kvpress:snapkv@0.5", "never a bare ratio"),
        ("", "unknown peer ''"),
    ],
)
def test_wrong_text(text: str, message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        PeerMethod.parse(text)


@pytest.mark.parametrize("project", PROJECTS)
def test_the_worker_has_the_methods_that_are_known_here(project: str) -> None:
    tree = ast.parse((WORKERS / f"answer_{project}.py").read_text())
    [table] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "METHODS"
        and isinstance(node.value, ast.Dict)
    ]
    names = [key.value for key in table.keys if isinstance(key, ast.Constant)]
    assert sorted(map(str, names)) == sorted(PROJECTS[project].methods)
    assert (WORKERS / f"{project}.txt").exists()


def test_transformers_own_cache_says_what_the_full_cache_says(bench: Bench, tmp_path: Path) -> None:
    groups = plan_groups(
        bench.subject.lm, recipes=["full"], peers=["transformers:dynamic"], tasks=["niah", "perplexity"],
        contexts=[400], protocols=["unseen", "seen"], samples=1, seed=3,
    )  # fmt: skip
    rows = list(run(bench, todo(groups, []), tmp_path / "rows.jsonl", quiet))
    assert [(row.task, row.protocol, row.recipe) for row in rows] == [
        (task, protocol, recipe)
        for task, protocol in (("niah", "unseen"), ("niah", "seen"), ("perplexity", "none"))
        for recipe in ("full", "peer:transformers:dynamic")
    ]
    for full, peer in zip(rows[::2], rows[1::2], strict=True):
        assert peer.scores == pytest.approx(full.scores, rel=1e-4)
        assert peer.kl == pytest.approx(0, abs=1e-5)
        assert peer.top1_agreement == 1
        assert (peer.prompt_tokens, peer.new_tokens, peer.instances) == (
            full.prompt_tokens,
            full.new_tokens,
            full.instances,
        )
        assert peer.kv_bytes == peer.kv_bytes_full == pytest.approx(full.kv_bytes_full)
        assert peer.kv_bytes_end > peer.kv_bytes
        assert not peer.frees_memory
        assert peer.versions["transformers: transformers"] == full.versions["transformers"]


@pytest.mark.skipif(find_spec("optimum") is not None, reason="quanto is installed here, so nothing would fail")
def test_a_peer_that_fails_is_told_and_the_run_goes_on(bench: Bench, tmp_path: Path) -> None:
    groups = plan_groups(
        bench.subject.lm, recipes=["full"], peers=["transformers:quanto4", "transformers:dynamic"], tasks=["niah"],
        contexts=[400], protocols=["unseen"], samples=1, seed=3,
    )  # fmt: skip
    told: list[str] = []
    rows: list[Row] = list(
        run(
            bench, todo(groups, []), tmp_path / "rows.jsonl", quiet, lambda g, recipe, error: told.append(f"{recipe} {error}")
        )
    )  # fmt: skip
    assert [row.recipe for row in rows] == ["full", "peer:transformers:dynamic"]
    assert len(told) == 1
    assert told[0].startswith("peer:transformers:quanto4 transformers: ")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import sys; sys.exit('no such library')", "the worker of kvpress ended: no such library"),
        (
            'input(); print(\'{"versions": {}, "methods": ["a"]}\', flush=True)',
            "has other methods: a",
        ),
    ],
)
def test_a_worker_that_cannot_start(lm: steno.LanguageModel, tmp_path: Path, source: str, message: str) -> None:
    environment(tmp_path, "kvpress")
    (tmp_path / "answer_kvpress.py").write_text(source)
    with Peers(tmp_path, tmp_path) as peers, pytest.raises(PeerError, match=message):
        peers.worker("kvpress", lm)


def test_no_peers_where_none_run(bench: Bench, lm: steno.LanguageModel) -> None:
    groups = plan_groups(
        lm, recipes=[], peers=["transformers:dynamic"], tasks=["niah"], contexts=[400], protocols=["unseen"],
        samples=1, seed=3,
    )  # fmt: skip
    with pytest.raises(BadArgument, match="no peers run here"):
        replace(bench, peers=None).row(groups[0], groups[0].recipes[0], [], quiet)
