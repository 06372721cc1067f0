"""What every place promises: entries whole or not at all, the quota, pins, tenants, seals."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from steno.errors import BadArgument, DamagedFile, StoreError
from steno.store.address import chunk_names, context_name, root_of
from steno.store.local import UNFINISHED
from steno.store.place import Entry, victims
from steno.store.store import Store, read_key

OpenStore = Callable[..., Store]


def name(number: int, kind: str = "chunk") -> str:
    return f"{number:064x}.{kind}"


def held(store: Store) -> list[int]:
    return [int(entry.name.split(".")[0], 16) for entry in store.entries()]


def put(store: Store, number: int, num_bytes: int = 100) -> None:
    store.put(name(number), [bytes([number]) * num_bytes])
    time.sleep(0.002)  # the times of entries must differ


def test_what_was_put_comes_back_and_goes(open_store: OpenStore) -> None:
    store = open_store()
    assert store.get(name(1)) is None
    assert store.entries() == []
    store.put(name(1), [b"ab", b"", b"cd"])
    store.put(name(2, "context"), [b""])
    found = open_store().get(name(1))
    assert found is not None
    assert (found.dtype, found.tobytes()) == (np.uint8, b"abcd")
    assert sorted(entry.num_bytes for entry in store.entries()) == [0, 4]
    store.put(name(1), [b"xyz"])
    again = store.get(name(1))
    assert again is not None
    assert again.tobytes() == b"xyz"
    store.remove(name(1))
    store.remove(name(1))
    assert store.get(name(1)) is None
    assert held(store) == [2]


def test_the_least_recently_used_go_when_the_quota_is_full(open_store: OpenStore) -> None:
    store = open_store(quota_bytes=350)
    for number in (1, 2, 3):
        put(store, number)
    store.used([name(1)])
    time.sleep(0.002)
    put(store, 4)
    assert set(held(store)) == {1, 3, 4}
    assert held(store)[0] == 3
    put(store, 1, 250)  # overwritten, larger
    assert set(held(store)) == {4, 1}


def test_the_first_of_several_that_are_used_together_goes_last(tmp_path: Path, redis_url: str) -> None:
    for source in (tmp_path, redis_url):
        store = Store(source, tenant="order")
        for number in (1, 2, 3):
            put(store, number)
        store.used([name(1), name(2), name(3)])
        assert held(store) == [3, 2, 1]


def test_what_is_pinned_stays(open_store: OpenStore) -> None:
    store = open_store(quota_bytes=250)
    put(store, 1)
    store.pin([name(1)])
    put(store, 2)
    put(store, 3)
    assert set(held(store)) == {1, 3}
    assert [entry.is_pinned for entry in store.entries()] == [True, False]
    with pytest.raises(StoreError, match="pinned"):
        put(store, 4, 200)
    assert set(held(store)) == {1, 3}, "what cannot be written removes nothing"
    store.pin([name(1)], pinned=False)
    put(store, 4, 200)
    assert held(store) == [4]


def test_what_is_larger_than_the_quota_is_refused(open_store: OpenStore) -> None:
    with pytest.raises(StoreError, match="quota"):
        put(open_store(quota_bytes=99), 1)
    with pytest.raises(BadArgument):
        open_store(quota_bytes=0)


def test_a_sweep_keeps_a_smaller_quota(open_store: OpenStore) -> None:
    store = open_store()
    for number in (1, 2, 3):
        put(store, number)
    store.pin([name(1)])
    assert open_store(quota_bytes=250).sweep() == [name(2)]
    assert open_store(quota_bytes=50).sweep() == [name(3)]  # what is pinned stays all the same
    assert held(store) == [1]


def test_tenants_do_not_see_each_other(open_store: OpenStore) -> None:
    one, other = open_store(tenant="one", quota_bytes=150), open_store(tenant="other", quota_bytes=150)
    put(one, 1)
    assert other.get(name(1)) is None
    assert other.entries() == []
    put(other, 2)
    other.remove(name(1))
    assert held(one) == [1]
    roots = [root_of({}, "full", tenant, None) for tenant in ("one", "other")]
    assert not {*chunk_names(roots[0], range(600))} & {*chunk_names(roots[1], range(600))}


def test_only_names_of_entries_are_names(open_store: OpenStore) -> None:
    store = open_store()
    for bad in (
        "../x",
        "a" * 64,
        name(1) + "\n",
        name(1).upper().replace("CHUNK", "chunk").replace("1.", "A."),
        ".lock",
    ):
        for operation in (
            store.get,
            store.remove,
            lambda n: store.put(n, []),
            lambda n: store.used([n]),
            lambda n: store.pin([n]),
        ):
            with pytest.raises(BadArgument):
                operation(bad)


def test_sealed_entries_open_with_their_key_alone(open_store: OpenStore) -> None:
    pytest.importorskip("cryptography")
    key = bytes(range(32))
    store = open_store(key=key)
    secret = b"the key is under the third stone"
    store.put(name(1), [secret])
    found = store.get(name(1))
    assert found is not None
    assert found.tobytes() == secret
    sealed = open_store().get(name(1))
    assert sealed is not None
    assert secret[:5] not in sealed.tobytes()
    with pytest.raises(DamagedFile, match="key"):
        open_store(key=bytes(32)).get(name(1))
    plain = open_store()
    plain.put(name(2), [sealed.tobytes()])  # moved to another name
    plain.put(name(3), [b"not sealed at all, but long enough to be"])
    for at in (0, 8, 20, len(sealed) - 1):
        changed = bytearray(sealed.tobytes())
        changed[at] ^= 1
        plain.put(name(4 + at), [bytes(changed)])
    plain.put(name(3000), [sealed.tobytes()[:30]])
    for entry in store.entries():
        if entry.name != name(1):
            with pytest.raises(DamagedFile):
                store.get(entry.name)
    assert root_of({}, "full", "", store.secret) != root_of({}, "full", "", None)
    with pytest.raises(BadArgument, match="16, 24 or 32"):
        open_store(key=b"short")


def test_addresses_say_what_lies_there() -> None:
    root = root_of({"model": 1}, "full", "", None)
    names = chunk_names(root, range(1000))
    assert len(names) == 3
    assert chunk_names(root, range(512)) == names[:2]
    assert chunk_names(root, [*range(500), *range(600)])[:1] == names[:1]
    assert not {*chunk_names(root, [1, *range(1, 1000)])} & {*names}, "a change moves all that follows"
    others = [root_of({"model": 2}, "full", "", None), root_of({"model": 1}, "int4", "", None)]
    assert len({root, *others}) == 3
    one = context_name(root, range(9), {"pass": None})
    assert one != context_name(root, range(9), {"pass": 256})
    assert one != context_name(root, range(10), {"pass": None})


def test_the_quota_takes_no_more_than_it_must() -> None:
    entries = [Entry(name=str(i), num_bytes=10, used_at=i, is_pinned=i == 0) for i in range(5)]
    assert victims(entries, None) == []
    assert [e.name for e in victims(entries, 30)] == ["1", "2"]
    assert [e.name for e in victims(entries, 30, new="1", new_bytes=5)] == ["2", "3"]
    assert len(victims(entries, 5)) == 4


def test_files_are_private_and_nothing_else_is_left(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store = Store(tmp_path / "a" / "b")
        put(store, 1)
        store.pin([name(1)])
        assert read_key_refuses_others(tmp_path)
    finally:
        os.umask(old)
    paths = list((tmp_path / "a").rglob("*"))
    assert all(stat.S_IMODE(p.stat().st_mode) == (0o700 if p.is_dir() else 0o600) for p in [tmp_path / "a", *paths])
    folder = next(p for p in paths if p.name.endswith(".chunk")).parent
    assert {p.name for p in folder.iterdir()} == {name(1), name(1) + ".pin", ".lock"}
    (folder / UNFINISHED).write_bytes(b"left by a writer that was killed")
    assert held(store) == [1]
    put(store, 2)
    assert not (folder / UNFINISHED).exists()
    (folder / UNFINISHED).touch()
    store.remove(name(1))
    assert store.sweep() == []
    assert {p.name for p in folder.iterdir()} == {name(2), ".lock"}


def read_key_refuses_others(folder: Path) -> bool:
    path = folder / "key"
    path.write_text("00ff" * 8 + "\n")
    with pytest.raises(BadArgument, match="chmod"):
        read_key(path)
    path.chmod(0o600)
    assert read_key(path) == bytes([0, 255]) * 8
    path.write_bytes(b"x" * 17)
    with pytest.raises(BadArgument, match="16, 24 or 32"):
        read_key(path)
    return True


def test_threads_keep_the_quota(open_store: OpenStore) -> None:
    store, errors = open_store(quota_bytes=1000), []

    def work(first: int) -> None:
        try:
            for number in range(first, first + 20):
                store.put(name(number), [bytes(100)])
                assert store.source.startswith("memory") or sum(e.num_bytes for e in store.entries()) <= 1000
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    store.sweep()
    assert sum(entry.num_bytes for entry in store.entries()) <= 1000


def test_a_place_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError):
        put(Store(tmp_path / "file"), 1)
    with pytest.raises(BadArgument, match="file system"):
        Store("nonsense://x")
    pytest.importorskip("redis")
    with pytest.raises(StoreError, match="Redis"):
        Store(f"unix://{tmp_path}/none").entries()


def test_what_the_server_dropped_is_swept(redis_url: str) -> None:
    import redis

    store = Store(redis_url, tenant="dropped")
    put(store, 1)
    put(store, 2)
    client = redis.Redis.from_url(redis_url)
    [key] = [k for k in client.keys("*data*") if k.endswith(name(1).encode()) and store.get(name(1)) is not None]
    client.delete(key)
    assert store.get(name(1)) is None
    assert store.sweep() == []
    assert held(store) == [2]


def test_a_store_needs_no_extra(tmp_path: Path) -> None:
    """Neither redis nor cryptography is imported by who does not ask for them."""
    code = (
        f"import sys; from steno.store.store import Store; Store({str(tmp_path)!r}); Store('memory://x');"
        "assert not {'redis', 'cryptography'} & {*sys.modules}"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
