"""Access methods on one layer: what they choose, against a loop, and that it is read and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from access_oracle import CHOOSING, Oracle, attention, content, draw, feed, read
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import steno
from steno.cache import access as cache_access
from steno.cache.accounting import is_offloaded, tensors_of
from steno.calibration import save_calibration
from steno.errors import CacheError
from tiny import OTHER_SHAPES, SHAPE, Shape, shared

HEADS, GROUP, DIM = SHAPE
STAGES = [
    "", "keydiff @ 200", "keydiff | adakv @ 200", "keydiff | pyramidkv @ 200", "int8", "keydiff | adakv | int4 @ 200", "hadamard",
    "keydiff | adakv | hadamard | int8 @ 200",
]  # fmt: skip
SHAPED = [(stages, SHAPE) for stages in STAGES] + [
    (stages, shape) for stages in ("keydiff | adakv @ 200", "keydiff | adakv | int4 @ 200") for shape in OTHER_SHAPES
]


@pytest.fixture(scope="session")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of hylra for three layers: the first reads everything, the second chooses, the third reuses."""
    path = tmp_path_factory.mktemp("hylra") / "plan.safetensors"
    save_calibration(path, {"source_layer": torch.tensor([-1.0, 1.0, 1.0])}, {})
    return str(path)


def composed(stages: str, access: str, plan_file: str = "") -> str:
    """`score | allocate | quantize | access @ budget`."""
    chain, _, budget = stages.partition(" @ ")
    return " | ".join(x for x in (chain, access.replace("PLAN", plan_file)) if x) + (f" @ {budget}" if budget else "")


@pytest.mark.parametrize(("stages", "shape"), SHAPED, ids=str)
@pytest.mark.parametrize("access", CHOOSING)
def test_what_is_read_is_what_a_loop_would_choose(access: str, stages: str, shape: Shape, plan_file: str) -> None:
    cache = read(composed(stages, access, plan_file), draw(2, 330, 1, shape))
    before = [draw(2, 1, 10 + i, shape) for i in range(3)]
    for step in before:
        feed(cache, step)
    new = draw(2, 1, 20, shape)
    out = feed(cache, new)
    for b in range(2):
        heads, chosen = content(cache).decode_row(b, torch.float32), []
        for h in range(shape.kv_heads):
            oracle = Oracle(cache, new[0][:, :, 0], b, h, [q[:, :, 0] for q, _, _ in before])
            read_of_segments = CHOOSING[access](oracle)
            assert len(read_of_segments) < len(oracle.keys) - oracle.in_tail
            chosen.append(read_of_segments + list(range(len(oracle.keys) - oracle.in_tail, len(oracle.keys))))
        expected = attention(new[0][b, :, 0], heads, chosen)
        torch.testing.assert_close(out[2, b, :, 0], expected, atol=1e-2 if "int" in stages else 1e-4, rtol=0)


@pytest.mark.parametrize("stages", ["", "int4", "hadamard | int8", "keydiff | adakv @ 900"])
def test_weights_of_all_tokens_are_found_tile_by_tile(stages: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers are those of whole copies, and no copy is larger than a tile of one head."""
    access, gather = "delta(tokens=64, full_layers='0')", cache_access.gather_tokens
    sizes: list[int] = []
    largest: list[int] = []
    answers: list[Tensor] = []

    def counted(table: object, entries: Tensor, *given: Tensor, **options: Any) -> object:
        sizes.append(len(entries) if options.get("values") is False else 0)
        return gather(table, entries, *given, **options)

    for tile in (10**6, 128):
        monkeypatch.setattr(cache_access, "TILE_TOKENS", tile)
        cache = read(composed(stages, access), draw(2, 1100, 1))
        monkeypatch.setattr(cache_access, "gather_tokens", counted)
        sizes.clear()
        answers.append(feed(cache, draw(2, 1, 2)))
        largest.append(max(sizes))
    assert largest[0] > 512
    assert largest[1] == 128
    assert torch.equal(*answers)


GROWING = [1, 3, 50, *[1] * 16]
"""Passes of 70 tokens, after which what was in the tail before them is in segments, and single steps have read them."""


EVERYTHING = [
    "quest(tokens=100000, dense_layers=0)", "moba(blocks=100000)", "double_sparsity(tokens=100000, dense_layers=0)",
    "delta(tokens=100000, full_layers='0')", "hylra(tokens=100000, weights='PLAN')",
    "sentencekv(tokens=100000, dense_steps=0)", "sentencekv(tokens=64, sinks=0, recent=0, dense_steps=1000)",
]  # fmt: skip


@pytest.mark.parametrize(("stages", "shape"), SHAPED, ids=str)
@pytest.mark.parametrize("access", EVERYTHING)
def test_reading_everything_is_reading_everything(access: str, stages: str, shape: Shape, plan_file: str) -> None:
    prompt = draw(2, 200, 1, shape)
    ours, plain = read(composed(stages, access, plan_file), prompt), read(stages or "full", prompt)
    for i, count in enumerate(GROWING):
        new = draw(2, count, 10 + i, shape)
        # products with packed codes round, those with tokens copied out of them do not
        assert torch.allclose(feed(ours, new), feed(plain, new), atol=1e-2 if "int" in stages else 1e-4)


@pytest.mark.parametrize("access", CHOOSING)
@given(lengths=st.lists(st.integers(2, 300), min_size=1, max_size=4), seed=st.integers(0, 9), adaptive=st.booleans())
@settings(max_examples=6, deadline=None)
def test_rows_of_any_length_answer_as_they_would_alone(
    plan_file: str, access: str, lengths: list[int], seed: int, adaptive: bool
) -> None:
    recipe = composed("keydiff | adakv @ 70%" if adaptive else "", access, plan_file)
    longest = max(lengths)
    prompt, steps = draw(len(lengths), longest, seed), [draw(len(lengths), 1, 100 + seed + i) for i in range(3)]
    together = read(recipe, prompt, lengths)
    alone = [
        read(recipe, tuple(x[b : b + 1, :, longest - n :] for x in prompt))
        for b, n in enumerate(lengths)  # type: ignore[arg-type]
    ]
    for step in steps:
        out = feed(together, step)
        for b, cache in enumerate(alone):
            single = feed(cache, tuple(x[b : b + 1] for x in step))  # type: ignore[arg-type]
            assert torch.allclose(out[:, b : b + 1], single, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("access", CHOOSING)
def test_forks_crops_and_batches_choose_alike(access: str, plan_file: str) -> None:
    cache = read(composed("keydiff | adakv @ 70%", access, plan_file), draw(2, 300, seed=1))
    for i, count in enumerate(GROWING):
        feed(cache, draw(2, count, seed=10 + i))
    twin, turned = cache.fork(), cache.fork()
    turned.reorder_cache(torch.tensor([1, 0, 1]))
    new = draw(2, 1, seed=200)
    expected = feed(cache, new)
    assert torch.allclose(feed(twin, new), expected, atol=1e-5)
    swapped = feed(turned, tuple(x[[1, 0, 1]] for x in new))  # type: ignore[arg-type]
    assert torch.allclose(swapped, expected[:, [1, 0, 1]], atol=1e-5)
    for removed in (1, 30, 40):  # back into the tail, then into the segments
        feed(twin, draw(2, removed, seed=300))
        twin.crop(-removed)
    feed(cache, draw(2, 1, seed=300))
    cache.crop(-1)  # what is kept from step to step begins anew on both sides
    fresh = draw(2, 1, seed=400)
    assert torch.allclose(feed(twin, fresh), feed(cache, fresh), atol=1e-4)


@pytest.mark.parametrize("access", [a for a in CHOOSING if not a.startswith(("delta", "hylra"))])
def test_an_index_that_grew_is_one_made_anew(access: str) -> None:
    cache = read(access, draw(2, 100, seed=1))
    for i, count in enumerate(2 * GROWING):
        feed(cache, draw(2, count, seed=10 + i))
    rows = content(cache)
    grown = rows.index
    assert grown is not None
    rows._index_all(grown.fixed)
    made = rows.index
    assert made is not None
    if grown.lengths is None or made.lengths is None:
        torch.testing.assert_close(grown.vectors, made.vectors)
        assert torch.equal(grown.counts, made.counts)
    else:  # a sentence that was cut when its beginning left the tail is two
        pairs = [
            (index.vectors * index.lengths[:, None], index.lengths)
            for index in (grown, made)
            if index.lengths is not None
        ]
        torch.testing.assert_close(*(sums.sum(0) for sums, _ in pairs), atol=1e-3, rtol=1e-4)
        assert len({int(lengths.sum()) for _, lengths in pairs}) == 1


def test_one_block_of_moba_is_the_own_one() -> None:
    cache = read("moba(blocks=1)", draw(1, 128, seed=1))
    new = draw(1, 1, seed=2)
    assert torch.allclose(feed(cache, new)[0], new[2].repeat_interleave(GROUP, 1), atol=1e-6)


def test_all_channels_of_double_sparsity_are_exact() -> None:
    cache = read("double_sparsity(tokens=3, channels=99, dense_layers=0)", draw(1, 64, seed=1))
    new = draw(1, 1, seed=2)
    out = feed(cache, new)[0, 0, :, 0]
    keys, values = (torch.cat([a[0], b[0]], 1) for a, b in zip(draw(1, 64, seed=1)[1:], new[1:], strict=True))
    heads = [(keys[h], values[h]) for h in range(HEADS)]
    chosen = []
    for h in range(HEADS):
        products = (new[0][0, h * GROUP : (h + 1) * GROUP, 0] @ keys[h, :64].T).amax(0)
        chosen.append([*products.topk(3).indices.tolist(), 64])
    assert torch.allclose(out, attention(new[0][0, :, 0], heads, chosen), atol=1e-5)


def test_a_needle_that_one_head_sees_is_read_by_all_layers_after() -> None:
    cache = read("delta(tokens=64, recent=0, full_layers='0')", draw(1, 640, seed=1))
    q, k, v = draw(1, 1, seed=2)
    needle = content(cache, 0).rows[0].segments[0]
    span = needle.spans()[1]  # type: ignore[index]
    span.keys[200] = q[0, 3, 0] * 3  # query head 3 reads KV head 1
    asked = list[Tensor]()
    for layer in cache.own_layers:
        layer.update(k, v)
        layer.attend(q, None, scale=DIM**-0.5)
        if layer.layer_idx == 0:
            asked.append(cache.reading.shared.salience[0])
    assert asked[0][:, 192:256].sum(1).argmax() in (0, 1)
    assert (asked[0].view(HEADS, -1)[:, :640].unflatten(1, (10, 64)).sum(2).argmax(1) == 3).all()
    assert not cache.reading.shared.salience  # nothing outlives its step


def test_a_cache_that_is_not_told_its_tokens_says_what_to_do() -> None:
    model = shared("llama")
    model.set_attn_implementation("steno")
    with pytest.raises(CacheError, match=r"announce"):
        model.generate(
            torch.randint(2, 90, (1, 20)), past_key_values=steno.KVCache(model.config, "sentencekv"), max_new_tokens=3
        )


def test_what_is_offloaded_is_not_in_memory_and_answers_the_same() -> None:
    prompt = draw(1, 512, seed=1)
    here, away = (read(f"sentencekv(tokens=100, dense_steps=0{more})", prompt) for more in ("", ", offload=True"))
    for i, count in enumerate(GROWING):
        assert torch.equal(*(feed(cache, draw(1, count, seed=10 + i)) for cache in (here, away)))
    in_segments = 3 * HEADS * 576 * 2 * DIM * 4
    assert here.kv_bytes_offloaded == 0
    assert in_segments <= away.kv_bytes_offloaded <= in_segments + 3 * 10 * 64
    assert abs(here.kv_bytes - away.kv_bytes - in_segments) <= 64
    files = {x.untyped_storage().filename for x in tensors_of(content(away).rows) if is_offloaded(x)}
    assert files
    assert not any(Path(str(name)).exists() for name in files)  # nobody else can open them, nothing is left behind
