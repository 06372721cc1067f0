"""Reads that begin with what earlier ones left: the same answer as from a cold start, whatever is there, missing or damaged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import steno
from steno.cache.accounting import tensors_of
from steno.cache.paged import PagedRows
from steno.codec.arrays import CHUNK_TOKENS
from steno.errors import DamagedFile, StenoWarning
from steno.store.shelf import ahead
from steno.store.store import Store
from tiny import save_with_bytes

DOCUMENT = "The key is under the third stone, says Ms. Q; é € 😀. " * 18
RECIPES = {  # and whether it can begin with chunks, and is stored as a whole context
    "full": (True, False), "int4": (True, True), "kvzip | adakv | kivi(bits=4) @ 50%": (True, True),
    "snapkv(window=16) @ 40%": (True, True), "keydiff @ 50%": (True, True), "expected_attention @ 50%": (False, True),
    "tova @ 100": (True, False), "xkv": (True, False), "h2o @ 50%": (False, False), "sentencekv": (True, True),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_bytes(tmp_path_factory.mktemp("models") / "llama", "llama", positions=2400)


@pytest.fixture
def load(folder: Path) -> Callable[..., Any]:
    return lambda store=None: steno.load(folder, dtype="fp32", store=store)


def answer(ctx: Any, max_new_tokens: int = 12) -> list[int]:
    return [i for step in ctx.ask("Where is the key?", max_new_tokens=max_new_tokens) for i in step.token_ids]


def bits(ctx: Any) -> list[bytes]:
    """Every tensor that the cache holds, as bytes; of the tail what is in use. Slots, which have spare ones, are left out."""
    found = []
    for layer in ctx.cache.own_layers:
        rows = layer.content
        parts = [*tensors_of(rows.rows[0].segments), *rows.tail.row(0)] if isinstance(rows, PagedRows) else []
        found += [f"{x.dtype} {[*x.shape]} ".encode() + x.contiguous().numpy().tobytes() for x in parts]
    return sorted(found)


@pytest.mark.filterwarnings("ignore:the context is not stored")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_warm_start_is_the_cold_one_to_the_bit(load: Any, recipe: str, tmp_path: Path) -> None:
    begins, is_whole = RECIPES[recipe]
    cold = load(tmp_path / "store").read(DOCUMENT, recipe)
    assert cold.stored_tokens == 0
    warm = load(tmp_path / "store").read(DOCUMENT, recipe)
    whole = len(cold.tokens) if is_whole else len(cold.tokens) // CHUNK_TOKENS * CHUNK_TOKENS
    assert warm.stored_tokens == (whole if begins or is_whole else 0)
    assert bits(warm) == bits(cold)
    assert answer(warm) == answer(cold) == answer(load().read(DOCUMENT, recipe))
    assert ("from the store" in str(warm.report())) == (warm.stored_tokens > 0)
    kinds = {entry.name.split(".")[1] for entry in load(tmp_path / "store").store.entries()}
    assert kinds == {kind for kind, is_there in (("chunk", begins), ("context", is_whole)) if is_there}


def test_texts_with_a_common_beginning_share_it(load: Any, tmp_path: Path) -> None:
    lm = load(tmp_path)
    first = lm.read(DOCUMENT + "One end.")
    longer = lm.read(DOCUMENT + "Another end, that is longer. " * 20)
    assert longer.stored_tokens == len(first.tokens) // CHUNK_TOKENS * CHUNK_TOKENS
    assert answer(longer) == answer(load(tmp_path / "other").read(DOCUMENT + "Another end, that is longer. " * 20))
    num_chunks = len(longer.tokens) // CHUNK_TOKENS
    assert len(lm.store.entries()) == num_chunks
    assert lm.read("x" + DOCUMENT).stored_tokens == 0


def test_recipes_share_the_chunks(load: Any, tmp_path: Path) -> None:
    lm = load(tmp_path)
    lm.read(DOCUMENT, "full")
    for recipe in ("int4", "snapkv(window=16) @ 40%"):
        ctx = lm.read(DOCUMENT, recipe)
        assert ctx.stored_tokens == 1024
        assert answer(ctx) == answer(load(tmp_path / recipe[:4]).read(DOCUMENT, recipe))


def test_the_last_queries_are_computed(load: Any, tmp_path: Path) -> None:
    lm = load(tmp_path)
    tokens = lm.prompt_tokens(DOCUMENT)[0][: 4 * CHUNK_TOKENS]
    lm.read_tokens(lm.prompt_tokens(DOCUMENT)[0])
    assert lm.read_tokens(tokens).stored_tokens == 3 * CHUNK_TOKENS, "one token at least is computed"
    assert lm.read_tokens(tokens[:-10], "snapkv(window=300) @ 400").stored_tokens == 2 * CHUNK_TOKENS
    assert lm.read_tokens(tokens[:100]).stored_tokens == 0


def test_evicting_while_reading_is_stored_whole(load: Any, tmp_path: Path) -> None:
    lm = load(tmp_path)
    cold = lm.read(DOCUMENT, "keydiff @ 300", chunk_tokens=200)
    assert [entry.name.split(".")[1] for entry in lm.store.entries()] == ["context"]
    warm = lm.read(DOCUMENT, "keydiff @ 300", chunk_tokens=200)
    assert warm.stored_tokens == len(warm.tokens)
    assert bits(warm) == bits(cold)
    assert lm.read(DOCUMENT, "keydiff @ 300", chunk_tokens=100).stored_tokens == 0


def test_another_model_dtype_or_tenant_finds_nothing(load: Any, folder: Path, tmp_path: Path) -> None:
    load(tmp_path / "store").read(DOCUMENT, "int4")
    other = save_with_bytes(tmp_path / "other", "llama", positions=2401)
    store = tmp_path / "store"
    for lm in (
        steno.load(other, dtype="fp32", store=store),
        steno.load(folder, dtype="bf16", store=store),
        load(Store(store, tenant="another")),
    ):
        assert lm.read(DOCUMENT, "int4").stored_tokens == 0


def test_a_sealed_store_answers_the_same(load: Any, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    key = bytes(range(16))
    cold = load(Store(tmp_path, key=key)).read(DOCUMENT, "int4")
    warm = load(Store(tmp_path, key=key)).read(DOCUMENT, "int4")
    assert warm.stored_tokens == len(cold.tokens)
    assert answer(warm) == answer(cold)
    assert load(Store(tmp_path, key=bytes(16))).read(DOCUMENT, "int4").stored_tokens == 0


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
        return
    if how == "cut":
        del data[len(data) // 2 :]
    elif how == "flipped":
        data[-5000] ^= 16
    elif how == "header":
        data[100] ^= 1
    elif how == "empty":
        data.clear()
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["gone", "cut", "flipped", "header", "empty", "swapped"])
@pytest.mark.parametrize("which", [0, 2, 3])
def test_a_damaged_chunk_is_read_anew_and_the_answer_is_the_same(
    load: Any, tmp_path: Path, how: str, which: int
) -> None:
    cold = load(tmp_path).read(DOCUMENT)
    paths = [next(tmp_path.rglob(name)) for name in load(tmp_path).shelf_of(DOCUMENT).names]
    if how == "swapped":
        paths[which].write_bytes(paths[which - 1].read_bytes())
    else:
        damage(paths[which], how)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ctx = load(tmp_path).read(DOCUMENT)
    told = [w for w in caught if issubclass(w.category, StenoWarning)]
    assert len(told) == (how != "gone"), [str(w.message) for w in told]
    assert ctx.stored_tokens == 3 * CHUNK_TOKENS, "the others are not computed"
    assert bits(ctx) == bits(cold)
    assert load(tmp_path).read(DOCUMENT).stored_tokens == 4 * CHUNK_TOKENS, "it was stored again"


@pytest.mark.parametrize("how", ["gone", "cut", "flipped", "header", "empty"])
def test_a_damaged_context_is_read_anew(load: Any, tmp_path: Path, how: str) -> None:
    recipe = "snapkv(window=16) | int4 @ 40%"
    cold = load(tmp_path).read(DOCUMENT, recipe)
    [path] = tmp_path.rglob("*.context")
    damage(path, how)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ctx = load(tmp_path).read(DOCUMENT, recipe)
    assert len([w for w in caught if issubclass(w.category, StenoWarning)]) == (how != "gone")
    assert ctx.stored_tokens == 4 * CHUNK_TOKENS
    assert bits(ctx) == bits(cold)
    assert load(tmp_path).read(DOCUMENT, recipe).stored_tokens == len(cold.tokens)


def test_a_store_that_fails_stops_no_read(load: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(StenoWarning, match="without its store"):
        ctx = load(tmp_path / "file").read(DOCUMENT)
    assert answer(ctx) == answer(load().read(DOCUMENT))
    with pytest.warns(StenoWarning, match="quota"):
        assert load(Store(tmp_path / "store", quota_bytes=1000)).read(DOCUMENT).stored_tokens == 0


def test_a_model_whose_layers_cannot_be_given_reads_as_ever(tmp_path: Path) -> None:
    folder = save_with_bytes(tmp_path / "m", "gemma3")
    lm = steno.load(folder, dtype="fp32", store=tmp_path / "store")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StenoWarning)
        for recipe in ("full", "int4"):
            ctx = [lm.read(DOCUMENT[:500], recipe) for _ in range(2)][1]
            assert ctx.stored_tokens == 0
            assert answer(ctx) == answer(steno.load(folder, dtype="fp32").read(DOCUMENT[:500], recipe))


# saved files


def test_a_damaged_file_is_read_again_where_header_and_tokens_are_whole(load: Any, tmp_path: Path) -> None:
    lm = load()
    for recipe, chunk_tokens in [("full", None), ("kvzip | adakv @ 40%", None), ("keydiff | int4 @ 300", 200)]:
        ctx = lm.read(DOCUMENT, recipe, chunk_tokens=chunk_tokens)
        path = tmp_path / "a.steno"
        for how in ("cut", "flipped"):
            ctx.save(path)
            damage(path, how)
            with pytest.warns(StenoWarning, match="read again"):
                again = lm.open(path)
            assert bits(again) == bits(ctx)
            assert answer(again) == answer(ctx)
            with pytest.raises(DamagedFile):
                lm.open(path, recompute=False)
        ctx.save(path)
        damage(path, "header")
        with pytest.raises(DamagedFile):
            lm.open(path)


def test_what_was_stored_can_be_saved_and_opened(load: Any, tmp_path: Path) -> None:
    load(tmp_path / "store").read(DOCUMENT)
    warm = load(tmp_path / "store").read(DOCUMENT)
    warm.save(tmp_path / "a.steno")
    damage(tmp_path / "a.steno", "cut")
    with pytest.warns(StenoWarning):
        assert bits(load().open(tmp_path / "a.steno")) == bits(warm), "it is read again in the same passes"


def test_looking_ahead_keeps_the_order_and_stops() -> None:
    loaded: list[int] = []

    def load(i: int) -> int:
        loaded.append(i)
        if i == 4:
            raise ValueError("four")
        return i

    found: list[int] = []
    with pytest.raises(ValueError, match="four"):
        found.extend(ahead(load, range(9)))
    assert found == [0, 1, 2, 3]
    assert max(loaded) <= 6
    assert [*ahead(load, [])] == []


def test_chunks_are_lossless_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    lms = [steno.load(folder, dtype="bf16", store=tmp_path) for _ in range(2)]
    cold, warm = (lm.read(DOCUMENT) for lm in lms)
    assert warm.stored_tokens == 1024
    heads = [ctx.cache.own_layers[2].content.decode_row(0, torch.bfloat16) for ctx in (cold, warm)]
    assert all(torch.equal(a, b) for one, other in zip(*heads, strict=True) for a, b in zip(one, other, strict=True))
