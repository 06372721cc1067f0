"""Contexts at a level of quality: finer levels are nearer and larger, layers refine, and headers that lie are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_file import DOCUMENT, answer, deep, rewritten

import steno
from steno.codec.container import SavedFile
from steno.codec.quality import MAX_STEP, QUALITIES, STEPS, LayerWeights
from steno.errors import BadArgument, DamagedFile
from tiny import save_with_bytes

RECIPES = [
    "full", "int4", "snapkv(window=16) | adakv | kivi(bits=4) @ 50%", "kvmerger @ 50%", "hadamard | int4", "palu | int8",
    "int4 | quest",
]  # fmt: skip


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return steno.load(save_with_bytes(tmp_path_factory.mktemp("models") / "llama", "llama"), dtype="fp32")


@pytest.fixture(scope="module")
def refined(lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """q5 in a coarse layer and two that refine it. Read only."""
    path = tmp_path_factory.mktemp("saved") / "a.steno"
    lm.read(DOCUMENT).save(path, "q5", refinements=2)
    return path


def heads(ctx: Any) -> list[torch.Tensor]:
    """Keys and values of every head of every layer."""
    layers = [layer.content.decode_row(0, torch.float32) for layer in ctx.cache.own_layers]
    return [x for layer in layers for pair in layer for x in pair]


def error(a: Any, b: Any) -> float:
    """Of the keys and values of two contexts, relative to the first."""
    pairs = list(zip(heads(a), heads(b), strict=True))
    assert all(x.shape == y.shape for x, y in pairs)
    return float(sum((x - y).norm() ** 2 for x, y in pairs) / sum(x.norm() ** 2 for x, _ in pairs)) ** 0.5


@pytest.mark.parametrize("recipe", RECIPES)
def test_finer_levels_are_nearer_and_larger(lm: Any, recipe: str, tmp_path: Path) -> None:
    ctx, path = lm.read(DOCUMENT, recipe), tmp_path / "a.steno"
    errors, sizes = [], []
    for quality in QUALITIES[1:]:
        sizes.append(ctx.save(path, quality))
        back = lm.open(path)
        assert SavedFile(path).header["level"] == quality
        assert back.cache.held_tokens() == ctx.cache.held_tokens()
        errors.append(error(ctx, back))
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.5
    assert errors[-1] < 0.03
    counts = [
        [s.log_counts for s in c.cache.own_layers[0].content.rows[0].segments if s.log_counts] for c in (ctx, back)
    ]
    assert bool(counts[0]) == bool(counts[1])
    assert len(answer(back, 70)) == 70  # until the tail is flushed
    back.cache.check_integrity()


def test_a_fine_level_answers_as_the_context_does(lm: Any, tmp_path: Path) -> None:
    ctx = lm.read(DOCUMENT)
    ctx.save(tmp_path / "a.steno", "q5")
    text = lm.tokenize(" The stone is grey.")
    full, found = (torch.cat([s.logprobs for s in c.follow_text(text)]) for c in (ctx, lm.open(tmp_path / "a.steno")))
    assert (full.exp() * (full - found)).sum(-1).mean() < 0.02


def test_each_prefix_of_the_layers_is_a_context(lm: Any, refined: Path, tmp_path: Path) -> None:
    ctx, data, path = lm.read(DOCUMENT), refined.read_bytes(), tmp_path / "part.steno"
    num_layers, errors = len(ctx.cache.layers), []
    for count in range(3):
        end = SavedFile(refined).bytes_until((count + 1) * num_layers)
        path.write_bytes(data[:end])
        errors.append(error(ctx, lm.open(path, refinements=count)))
        if count < 2:
            with pytest.raises(DamagedFile):
                lm.open(path, refinements=count + 1, recompute=False)
        path.write_bytes(data[: end - 1])
        with pytest.raises(DamagedFile):
            lm.open(path, refinements=count, recompute=False)
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2]
    assert error(lm.open(refined), lm.open(refined, refinements=2)) == 0


def test_levels_that_there_are_not_are_refused(lm: Any, tmp_path: Path) -> None:
    ctx = lm.read(DOCUMENT)
    for quality, refinements in [("q6", 0), ("", 0), ("q3", 4), ("q3", -1), ("lossless", 1)]:
        with pytest.raises(BadArgument, match="q"):
            ctx.save(tmp_path / "a.steno", quality, refinements=refinements)
    assert not list(tmp_path.iterdir())


def test_weights_move_precision_between_layers() -> None:
    weights, step = LayerWeights(keys=torch.tensor([4.0, 0.8, 0.01]), values=None), STEPS["q2"]
    assert weights.steps("q2", 0, [1.0, 2.0]) == (step / 4, 2 * step)
    assert weights.steps("q2", 1, [3.0, 2.0]) == pytest.approx((3 * step / 0.8, 2 * step))
    assert weights.steps("q2", 2, [1.0, 2.0]) == (MAX_STEP, 2 * step)


def of_keys(header: dict[str, Any]) -> dict[str, Any]:
    return deep(header, "cache", "layers", 1, "coded", "keys")


LIES = {
    "no keys": lambda h: deep(h, "cache", "layers", 1, "coded").pop("keys"),
    "other lengths": lambda h: deep(h, "cache", "layers", 1, "coded").update(lengths=[1, 2]),
    "all heads": lambda h: of_keys(h).update(heads_together=99),
    "no number of heads": lambda h: of_keys(h).update(heads_together="2"),
    "no basis": lambda h: of_keys(h).update(basis=None, heads_together=2),
    "another basis": lambda h: of_keys(h).update(basis=of_keys(h)["mean"], heads_together=2),
    "another mean": lambda h: of_keys(h).update(mean=of_keys(h)["coarse"]),
    "another coarse": lambda h: of_keys(h).update(coarse=of_keys(h)["recent"]),
    "another recent": lambda h: of_keys(h).update(recent=of_keys(h)["coarse"]),
    "a refinement of none": lambda h: of_keys(h).update(refinements=[of_keys(h)["recent"]]),
    "refinements as text": lambda h: of_keys(h).update(refinements="abc"),
    "wide rotation": lambda h: deep(h, "cache", "layers", 1, "coded").update(frequencies=[1.0] * 999),
    "no rotation": lambda h: deep(h, "cache", "layers", 1, "coded").update(frequencies=[[1.0]]),
    "other counts": lambda h: deep(h, "cache", "layers", 1, "coded").update(log_counts=of_keys(h)["coarse"]),
    "first of another": lambda h: deep(h, "cache", "layers", 1, "coded").update(first=[0, 0]),
    "more first": lambda h: deep(h, "cache", "layers", 1, "coded")["first"].append(1),
    "segments too few": lambda h: deep(h, "cache", "layers", 1).pop("coded"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lm: Any, refined: Path, tmp_path: Path, lie: str) -> None:
    assert lm.open(rewritten(refined, tmp_path / "true.steno", lambda h: None))
    with pytest.raises(DamagedFile):
        lm.open(rewritten(refined, tmp_path / "a.steno", LIES[lie]), recompute=False)


def test_a_changed_byte_of_a_refinement_is_found(lm: Any, refined: Path, tmp_path: Path) -> None:
    data, path = bytearray(refined.read_bytes()), tmp_path / "a.steno"
    data[SavedFile(refined).bytes_until(3) + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match="digest"):
        lm.open(path, recompute=False)
    assert lm.open(path, refinements=0)
