"""Two writers are killed at random moments: what they had committed opens, nothing else is to be seen, the quota holds."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

import steno
from steno.codec.cache import read_tokens
from steno.codec.container import SavedFile
from steno.codec.whole import write_whole
from steno.store.check import check_entry
from steno.store.store import NAME, Store
from tiny import save_with_bytes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="writers are forked")
LONGEST_S = 0.05


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The entries of a dozen texts, as a read leaves them."""
    store = Store(tmp_path_factory.mktemp("made"))
    folder = save_with_bytes(tmp_path_factory.mktemp("models") / "llama", "llama")
    lm = steno.load(folder, dtype="fp32", store=store)
    for i in range(12):
        lm.read(f"Text {i} is about a hen. " * (10 + 2 * i), "int4")
    found = {entry.name: store.get(entry.name) for entry in store.entries()}
    return {name: data.tobytes() for name, data in found.items() if data is not None}


def write_forever(source: Path, saved: Path, entries: dict[str, bytes], quota_bytes: int, told: int, seed: int) -> None:
    """A writer: entries into the store, files beside it; it tells of each file once it is committed."""
    store, rng, names = Store(source, quota_bytes=quota_bytes), random.Random(seed), [*entries]
    while True:
        name = rng.choice(names)
        store.put(name, [entries[name][:1000], entries[name][1000:]])
        name = rng.choice([x for x in names if x.endswith("context")])
        path = saved / f"{rng.randrange(20)}.steno"
        write_whole(path, [entries[name]])
        os.write(told, f"{path.name}\n".encode())


def kill_two_writers(source: Path, saved: Path, entries: dict[str, bytes], quota_bytes: int, seed: int) -> set[str]:
    """The files that the writers had told of before they were killed."""
    rng, children = random.Random(seed), []
    for i in range(2):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_forever(source, saved, entries, quota_bytes, write_end, 2 * seed + i)
            finally:
                os._exit(1)  # only an error comes here
        os.close(write_end)
        children.append((child, read_end))
    time.sleep(rng.random() * LONGEST_S)
    committed: set[str] = set()
    for child, read_end in rng.sample(children, 2):
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "a writer failed before it was killed"
        time.sleep(rng.random() * LONGEST_S / 5)  # the other one goes on for a moment
        with os.fdopen(read_end, "rb") as pipe:
            os.set_blocking(pipe.fileno(), False)
            committed |= {*(pipe.read() or b"").decode().split()}
    return committed


def check(source: Path, saved: Path, committed: set[str], quota_bytes: int) -> tuple[int, int]:
    """Looks at what the killed writers left; how many entries there are, and whether an unfinished one lies beside."""
    store = Store(source, quota_bytes=quota_bytes)
    present = store.entries()
    assert [error for entry in present if (error := check_entry(store, entry.name))] == []
    files = [path for path in source.rglob("*") if path.is_file()]
    assert {path.name for path in files if not path.name.startswith(".")} == {entry.name for entry in present}
    assert all(NAME.fullmatch(entry.name) for entry in present)
    assert sum(path.stat().st_size for path in files) <= quota_bytes, "unfinished files count, too"
    visible = [path for path in saved.iterdir() if not path.name.startswith(".")]
    assert committed <= {path.name for path in visible}
    for path in visible:
        file = SavedFile(path)
        assert read_tokens(file)
        assert all(file.read_group(group) for group in file.groups)
    return len(present), sum(path.name == ".unfinished" for path in files)


def rounds(count: int, tmp_path: Path, entries: dict[str, bytes]) -> tuple[int, int]:
    """Committed files and unfinished entries over all rounds."""
    source, saved = tmp_path / "store", tmp_path / "saved"
    saved.mkdir()
    quota_bytes = sum(map(len, entries.values())) // 3
    assert quota_bytes > max(map(len, entries.values()))
    num_committed = num_unfinished = 0
    known: set[str] = set()
    for seed in range(count):
        told = kill_two_writers(source, saved, entries, quota_bytes, seed)
        known |= told
        num_committed += len(told)
        num_unfinished += check(source, saved, known, quota_bytes)[1]
    store = Store(source, quota_bytes=quota_bytes)
    name = next(iter(entries))
    store.put(name, [entries[name]])  # no lock is left
    assert store.sweep() == []
    assert not [*source.rglob(".unfinished")]
    return num_committed, num_unfinished


def test_killed_writers_leave_a_whole_store(tmp_path: Path, entries: dict[str, bytes]) -> None:
    assert rounds(8, tmp_path, entries)[0] > 0


@pytest.mark.slow
def test_200_rounds_of_killed_writers_leave_a_whole_store(tmp_path: Path, entries: dict[str, bytes]) -> None:
    committed, unfinished = rounds(200, tmp_path, entries)
    assert committed > 200
    assert unfinished > 10, "writers must be killed in the middle of a write, too"
