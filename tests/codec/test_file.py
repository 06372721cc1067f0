"""Contexts as files: what was saved comes back to the bit and answers the same; what was changed is refused."""

from __future__ import annotations

import json
import stat
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import steno
from steno.cache.accounting import tensors_of
from steno.cache.segment import DenseSegment
from steno.cache.transformed import TransformedSegment
from steno.codec.cache import read_tokens
from steno.codec.container import ALIGNMENT, MAGIC, PREFIX, FileWriter, SavedFile, digest
from steno.codec.forms import build_segment, store_segment
from steno.errors import BadArgument, CacheError, DamagedFile
from steno.methods.transform.hadamard import hadamard_basis
from tiny import save_with_bytes

DOCUMENT = "The key is under the third stone, says Ms. Q; é € 😀. " * 9
RECIPES = [
    "full", "int8", "int4", "kivi(bits=2)", "snapkv(window=16) @ 40%",
    "snapkv(window=16) | adakv | kivi(bits=4) @ 50%", "kvzip | adakv @ 40%",
    "fp8", "nvfp4", "q4_0", "int4 | quest", "int4 | double_sparsity", "int4 | sentencekv",
    "hadamard @ 100%", "hadamard | kivi(bits=2)", "shorthand @ 60%",
]  # fmt: skip


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return steno.load(save_with_bytes(tmp_path_factory.mktemp("models") / "llama", "llama"), dtype="fp32")


@pytest.fixture(scope="module")
def saved(lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of ragged heads, pages, a bitmap and a tail. Read only."""
    path = tmp_path_factory.mktemp("saved") / "a.steno"
    lm.read(DOCUMENT, RECIPES[5]).save(path)
    return path


def held(cache: Any) -> list[bytes]:
    """Every tensor that a cache holds, as bytes; of the tail what is in use."""
    found = []
    for layer in cache.own_layers:
        rows = layer.content
        for x in [*tensors_of([rows.rows[0].segments, rows.rows[0].kept]), *rows.tail.row(0)]:
            found.append(f"{x.dtype} {[*x.shape]} ".encode() + x.contiguous().numpy().tobytes())
    return sorted(found)


def answer(ctx: Any, max_new_tokens: int) -> list[int]:
    return [i for step in ctx.ask("Where is the key?", max_new_tokens=max_new_tokens) for i in step.token_ids]


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_was_saved_comes_back_and_answers_the_same(lm: Any, recipe: str, tmp_path: Path) -> None:
    ctx = lm.read(DOCUMENT, recipe)
    num_bytes = ctx.save(tmp_path / "folder" / "a.steno")
    path = tmp_path / "folder" / "a.steno"
    assert path.stat().st_size == num_bytes
    assert [p.name for p in path.parent.iterdir()] == ["a.steno"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    back = lm.open(path)
    assert held(back.cache) == held(ctx.cache)
    assert back.tokens == ctx.tokens
    assert back.report().kv_bytes_full == ctx.report().kv_bytes_full
    new_tokens = 70 if "kivi" in recipe else 8  # some until the tail is flushed
    assert answer(back, new_tokens) == answer(ctx, new_tokens)


def test_a_question_that_was_read_is_answered(lm: Any, tmp_path: Path) -> None:
    ctx = lm.read(DOCUMENT, "int4", question="Who?")
    ctx.save(tmp_path / "a.steno")
    tokens = [
        [i for s in c.ask(None, max_new_tokens=5) for i in s.token_ids] for c in (ctx, lm.open(tmp_path / "a.steno"))
    ]
    assert tokens[0] == tokens[1]


def test_what_a_file_cannot_hold_is_refused_before_a_byte_is_written(lm: Any, tmp_path: Path) -> None:
    for recipe, words in [
        ("tova @ 100", "evicts at every step"),
        ("think | int4", "another basis"),
        ("palu | int4", "yet"),
        ("minicache", "yet"),
    ]:
        with pytest.raises(CacheError, match=words):
            lm.read(DOCUMENT, recipe).save(tmp_path / "a.steno")
    assert not list(tmp_path.iterdir())


def test_a_rotation_that_is_not_ours_is_refused() -> None:
    inner = DenseSegment(keys=torch.ones(3, 16), values=torch.ones(3, 16), offsets=(0, 1, 3))
    rotated = TransformedSegment(inner=inner, basis=hadamard_basis(16, 16, torch.device("cpu")))
    name, stored = store_segment(rotated)
    tensors = {key: matrix.rows for key, matrix in stored.matrices.items()}
    back = build_segment(name, stored.fields, tensors, num_kv_heads=2, head_dim=16)
    assert isinstance(back, TransformedSegment)
    assert back.basis is rotated.basis
    for basis in (-tensors["basis"], tensors["basis"][:8], tensors["basis"] * float("nan")):
        with pytest.raises(DamagedFile):
            build_segment(name, stored.fields, {**tensors, "basis": basis}, num_kv_heads=2, head_dim=16)
    with pytest.raises(DamagedFile, match="hadamard hadamard"):
        build_segment(f"hadamard {name}", stored.fields, tensors, num_kv_heads=2, head_dim=16)


def test_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    other = steno.load(save_with_bytes(tmp_path / "m", "llama", positions=1300), dtype="fp32")
    with pytest.raises(BadArgument, match="was read by"):
        other.open(saved)


def test_a_model_in_another_dtype_is_refused(saved: Path, lm: Any) -> None:
    with pytest.raises(BadArgument, match="float32"):
        steno.load(lm.loaded.source, dtype="bf16").open(saved)


def test_a_changed_byte_is_found(lm: Any, saved: Path, tmp_path: Path) -> None:
    data, path = saved.read_bytes(), tmp_path / "a.steno"
    rng = np.random.default_rng(0)
    used = used_bytes(saved)
    for at in [*range(0, 48), *rng.choice(used, 60).tolist()]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :])
        with pytest.raises(DamagedFile):
            lm.open(path, recompute=False)


def used_bytes(path: Path) -> np.ndarray:
    """Where the file has bytes that are no padding."""
    file = SavedFile(path)
    parts = [(0, file._start), (file._start + file.header["tables"][0], file.header["tables"][1])]
    parts += [(file._start + offset, length) for _, _, offset, length, _ in file.header["chunks"]]
    header_bytes = PREFIX.unpack(path.read_bytes()[: PREFIX.size])[3]
    parts[0] = (0, PREFIX.size + header_bytes)
    return np.concatenate([np.arange(a, a + n) for a, n in parts])


def test_a_file_that_is_cut_is_refused(lm: Any, saved: Path, tmp_path: Path) -> None:
    data, path = saved.read_bytes(), tmp_path / "a.steno"
    for length in [0, 1, 39, 40, 41, 3000, len(data) // 2, len(data) - ALIGNMENT - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(DamagedFile):
            lm.open(path, recompute=False)


def rewritten(saved: Path, path: Path, change: Any) -> Path:
    """The file with another header, its digest right: what somebody who means harm would write."""
    data = saved.read_bytes()
    length = PREFIX.unpack(data[: PREFIX.size])[3]
    header = json.loads(data[PREFIX.size : PREFIX.size + length])
    body = data[-(-(PREFIX.size + length) // ALIGNMENT) * ALIGNMENT :]
    change(header)
    text = json.dumps(header).encode()
    start = data[:16] + len(text).to_bytes(8, "little")
    front = start + bytes.fromhex(digest(start, text)) + text
    path.write_bytes(front + bytes(-len(front) % ALIGNMENT) + body)
    return path


def deep(header: dict[str, Any], *keys: Any) -> Any:
    for key in keys:
        header = header[key]
    return header


LIES = {
    "huge array": lambda h: h["arrays"][1].update(offsets=[0, 1 << 46, 1 << 46]),
    "many columns": lambda h: h["arrays"][1].update(columns=1 << 40),
    "falling offsets": lambda h: h["arrays"][1].update(offsets=[0, 9, 3]),
    "offset of a chunk": lambda h: h["chunks"][0].__setitem__(2, 1 << 40),
    "length of a chunk": lambda h: h["chunks"][0].__setitem__(3, -1),
    "no chunks": lambda h: h.update(chunks=[]),
    "no arrays": lambda h: h.update(arrays=[]),
    "text for a list": lambda h: h.update(arrays="x"),
    "another dtype": lambda h: h["arrays"][1].update(dtype="complex64"),
    "another float": lambda h: h["arrays"][-1].update(dtype="int32"),
    "more tables": lambda h: h["arrays"][1].update(tables=[9] * 4),
    "no cache": lambda h: h.pop("cache"),
    "fewer layers": lambda h: h["cache"]["layers"].pop(),
    "a class name": lambda h: deep(h, "cache", "layers", 0, "segments", 0).update(form="builtins.eval"),
    "other bits": lambda h: deep(h, "cache", "layers", 0, "segments", 0).update(bits=8),
    "odd bits": lambda h: deep(h, "cache", "layers", 0, "segments", 0).update(bits=3),
    "other pages": lambda h: deep(h, "cache", "layers", 0, "segments", 0).update(offsets=[0, 1, 2]),
    "array of another layer": lambda h: deep(h, "cache", "layers", 0, "tail").__setitem__(0, 0),
    "more heads": lambda h: deep(h, "cache", "layers", 0).update(kv_heads=1 << 20),
    "more seen": lambda h: deep(h, "cache", "layers", 0).update(seen_tokens=7),
    "all seen": lambda h: [layer.update(seen_tokens=1 << 30) for layer in h["cache"]["layers"]],
    "longer prompt": lambda h: deep(h, "cache", "layers", 0).update(prompt_tokens=1 << 30),
    "tokens elsewhere": lambda h: h["cache"].update(tokens=3),
    "no recipe": lambda h: h.update(recipe=None),
    "no model": lambda h: h.update(model=None),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lm: Any, saved: Path, tmp_path: Path, lie: str) -> None:
    assert lm.open(rewritten(saved, tmp_path / "true.steno", lambda h: None))
    with pytest.raises(DamagedFile):
        lm.open(rewritten(saved, tmp_path / "a.steno", LIES[lie]))


def test_a_file_of_zeros_that_claims_gigabytes_is_refused(tmp_path: Path) -> None:
    writer = FileWriter()
    writer.add(torch.zeros(1 << 24, 1, dtype=torch.uint8), 0, offsets=(0, 1 << 24))
    writer.write(tmp_path / "a.steno", {})
    with pytest.raises(DamagedFile, match="claim"):
        SavedFile(tmp_path / "a.steno")


def test_other_files_are_no_contexts(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="no such file"):
        SavedFile(tmp_path / "a.steno")
    with pytest.raises(BadArgument):
        SavedFile(tmp_path)
    (tmp_path / "b.txt").write_text("A text that is longer than forty bytes, which a prefix has.")
    with pytest.raises(DamagedFile, match="begin"):
        SavedFile(tmp_path / "b.txt")


def test_tokens_can_be_read_without_a_model(lm: Any, saved: Path) -> None:
    assert read_tokens(SavedFile(saved)) == lm.prompt_tokens(DOCUMENT)[0]


@pytest.mark.parametrize("body", [0, 1 << 23])
def test_a_header_that_would_take_many_times_the_file_is_refused(tmp_path: Path, body: int) -> None:
    text = b"[" + b"[]," * (1 << 19) + b"0]"
    start = MAGIC + struct.pack("<IIQ", 1, 0, len(text))
    (tmp_path / "a.steno").write_bytes(start + bytes.fromhex(digest(start, text)) + text + bytes(body))
    tracemalloc.start()
    with pytest.raises(DamagedFile, match="proportion"):
        SavedFile(tmp_path / "a.steno")
    assert tracemalloc.get_traced_memory()[1] < 2 * len(text)
    tracemalloc.stop()
