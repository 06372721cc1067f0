"""A cached folder is built once, appears whole or not at all, and is remade when it is damaged."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steno.errors import ModelError
from steno.models.folder_cache import MANIFEST, default_cache_dir, ensure_folder, is_complete

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 100, "tokenizer/tokenizer.json": b"tokens" * 10}

needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork and signals")
ignore_fork_warning = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def write_files(folder: Path) -> None:
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def never(folder: Path) -> NoReturn:
    raise AssertionError(f"built {folder} although nothing was missing")


def ensure(target: Path, build=write_files, need_bytes: int = 0) -> list[str]:
    notices: list[str] = []
    assert ensure_folder(target, build, need_bytes=need_bytes, notify=notices.append) == target
    return notices


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_is_built_once_and_whole(tmp_path):
    target = tmp_path / "deep" / "model"
    assert not is_complete(target)
    ensure(target)
    assert is_complete(target)
    assert {name: (target / name).read_bytes() for name in FILES} == FILES
    assert names(target.parent) == {"model", "model.lock"}
    assert ensure(target, never) == []


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_damaged_folder_is_remade(tmp_path, name, damage):
    target = tmp_path / "model"
    ensure(target)
    if damage == "delete":
        (target / name).unlink()
    else:
        os.truncate(target / name, (target / name).stat().st_size // 2)
    assert not is_complete(target)
    ensure(target)
    assert is_complete(target)
    assert (target / name).is_file()
    assert names(tmp_path) == {"model", "model.lock"}


@settings(max_examples=50, deadline=None)
@given(
    text=st.binary(max_size=60) | st.sampled_from([b"[]", b'{"format":1}', b'{"format":1,"files":{}}', b'{"format":2}'])
)
def test_any_manifest_that_is_not_ours_counts_as_damage(text):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST).write_bytes(text)
        assert not is_complete(Path(folder))


def test_disk_full_leaves_nothing(tmp_path):
    def full(folder: Path) -> None:
        write_files(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ModelError, match=r"disk is full: 5 MB must be free in .*; free some space"):
        ensure(tmp_path / "model", full, need_bytes=5_000_000)
    assert names(tmp_path) <= {"model.lock"}


def test_too_little_space_is_told_before_building(tmp_path):
    with pytest.raises(ModelError, match="disk is full"):
        ensure(tmp_path / "model", never, need_bytes=1 << 62)


def test_failed_rebuild_keeps_the_old_folder_and_no_rest(tmp_path):
    target = tmp_path / "model"
    ensure(target)
    (target / "config.json").write_bytes(b"")

    def fail(folder: Path) -> None:
        write_files(folder)
        raise ModelError("no network")

    with pytest.raises(ModelError, match="no network"):
        ensure(target, fail)
    assert names(tmp_path) == {"model", "model.lock"}


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot write .*; choose a cache directory that can be written"):
        ensure(tmp_path / "file" / "model")


def _build_slowly(target: Path, log: Path) -> None:
    def build(folder: Path) -> None:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.5)
        write_files(folder)

    notices = ensure(target, build)
    with log.open("a") as file:
        file.writelines(f"{line}\n" for line in notices)


@needs_fork
@ignore_fork_warning
def test_two_processes_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    target, log = tmp_path / "model", tmp_path / "log"
    workers = [context.Process(target=_build_slowly, args=(target, log)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(log.read_text().splitlines()) == [
        "another process is preparing model; waiting for it",
        "built",
    ]
    assert is_complete(target)


def _build_and_hang(target: Path, mark: Path) -> None:
    def build(folder: Path) -> None:
        write_files(folder)
        mark.touch()
        time.sleep(60)

    ensure(target, build)


@needs_fork
@ignore_fork_warning
def test_kill_in_the_middle_leaves_a_usable_cache(tmp_path):
    target, mark = tmp_path / "model", tmp_path / "mark"
    worker = multiprocessing.get_context("fork").Process(target=_build_and_hang, args=(target, mark))
    worker.start()
    deadline = time.monotonic() + 20
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(20)
    assert any(name.startswith(".model.part-") for name in names(tmp_path))
    assert not target.exists()
    ensure(target)
    assert is_complete(target)
    assert names(tmp_path) == {"model", "model.lock", "mark"}


def test_default_cache_dir_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "steno"


@pytest.mark.parametrize("value", ["", "relative/path"])
def test_default_cache_dir_ignores_a_useless_xdg(monkeypatch, value):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert default_cache_dir().is_relative_to(Path.home())
    assert "steno" in default_cache_dir().parts
