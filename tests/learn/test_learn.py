"""What methods learn: the same under a seed, resumed as if never interrupted, found by recipes, and sensible on toys."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import steno
from steno.calibration import read_about
from steno.cli.main import run
from steno.errors import CalibrationError, PromptError
from steno.learn import LEARNERS, training
from steno.learn.gather import look
from steno.learn.hylra import chosen_pages, overlap
from steno.learn.kvquant import gradients
from steno.learn.locret import labels
from steno.learn.options import Options
from steno.learn.passages import passages
from steno.learn.pieces import pieces
from steno.learn.razorattention import repeated_attention
from steno.learn.trim_kv import over_capacity, retained_logits
from steno.methods import METHODS
from steno.models.default import DEFAULT_MODEL
from steno.models.learned import SHIPPED, learned_file
from steno.types import LayerKV, Need, Observation
from tiny import save_with_bytes

TEXT = " ".join(
    f"In the year {n} the hen of house {n % 7} laid {n % 5} eggs under the old stone by the river bank."
    for n in range(60)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_bytes(tmp_path_factory.mktemp("models") / "llama", "llama", positions=2048)


@pytest.fixture(scope="module")
def lm(folder: Path) -> Any:
    return steno.load(folder, dtype="fp32")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    place = tmp_path / "data.txt"
    place.write_text(TEXT[:2000])
    return place


STATISTICS = {id for id, cls in METHODS.items() if "statistics" in {f.name for f in dataclasses.fields(cls)}}
"""Methods that take theirs from the prompt where there is no file."""
SHIPPED_STATISTICS = {"cskv", "kvquant", "double_sparsity"}


@pytest.mark.parametrize("method", ["palu", "cskv", "rotatekv"])
def test_moments_serve_a_transform(method: str, folder: Path, lm: Any, data: Path, tmp_path: Path) -> None:
    place = tmp_path / "moments.safetensors"
    assert run(["calibrate", method, "--model", str(folder), "--data", str(data), "--out", str(place)]) == 0
    ctx = lm.read(TEXT[:600], f"{method}(statistics={str(place)!r})")
    steps = list(ctx.go_on([5], max_new_tokens=3, keep_logprobs=True))
    assert all(torch.isfinite(step.logprobs).all() for step in steps if step.logprobs is not None)
    ctx.cache.check_integrity()


OF_FILES = {"kvtc"}
"""What is learned for files, and no method of a recipe."""


def test_the_table_knows_its_methods() -> None:
    of_recipes = set(LEARNERS) - OF_FILES
    assert all(LEARNERS[id].command == ("train" if METHODS[id].trained else "calibrate") for id in of_recipes)
    weighted = {id for id, cls in METHODS.items() if "weights" in {f.name for f in dataclasses.fields(cls)}}
    assert weighted == of_recipes - STATISTICS
    assert set(LEARNERS) >= STATISTICS
    assert all((learner.steps > 0) == (learner.command == "train") for learner in LEARNERS.values())


@pytest.mark.parametrize("method", [id for id in LEARNERS if id not in STATISTICS | OF_FILES])
def test_a_command_learns_and_recipes_find_it(
    method: str, folder: Path, lm: Any, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    learner = LEARNERS[method]
    kind = METHODS[method].kind
    chooses = "" if kind == "score" else "keydiff | "
    recipe = f"{chooses}{method} @ 50%"
    with pytest.raises(CalibrationError, match=f"run `steno {learner.command} {method} --model M` once"):
        lm.read(TEXT[:600], recipe)
    steps = ["--steps", "2"] if learner.command == "train" else []
    assert run([learner.command, method, "--model", str(folder), "--data", str(data), *steps]) == 0
    place = learned_file(method, lm.loaded.model_hash)
    assert f"wrote {place}" in capsys.readouterr().err
    assert [p.name for p in place.parent.iterdir()] == [place.name]
    about = read_about(place)
    assert (about["model_hash"], about["method"], about["seed"]) == (lm.loaded.model_hash, method, "0")
    ctx = lm.read(TEXT[:600], recipe)
    assert "".join(step.text for step in ctx.ask("Where?", max_new_tokens=3)) is not None
    held = [n for layer in ctx.cache.held_tokens() for row in layer for n in row]
    assert sum(held) == len(held) * int(len(ctx.tokens) / 2)
    again = tmp_path / "again.safetensors"
    assert run([learner.command, method, "--model", str(folder), "--data", str(data), *steps, "--out", str(again)]) == 0
    assert place.read_bytes() == again.read_bytes()


def test_layers_whose_errors_change_more_weigh_more(folder: Path, lm: Any, data: Path, tmp_path: Path) -> None:
    place = tmp_path / "weights.safetensors"
    assert run(["calibrate", "kvtc", "--model", str(folder), "--data", str(data), "--out", str(place)]) == 0
    weights = load_file(place)
    for name in ("keys", "values"):
        assert weights[name].shape == (len(lm.read(TEXT[:600]).cache.own_layers),)
        assert weights[name].log().mean().abs() < 1e-4
    assert lm.model.config._attn_implementation == "steno"


@pytest.mark.parametrize("method", sorted(STATISTICS))
def test_recipes_find_statistics_where_there_are_some(
    method: str, folder: Path, lm: Any, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kind = METHODS[method].kind
    recipe = f"{method} @ 50%" if kind == "score" else method

    def stage() -> Any:
        found = lm.read(TEXT[:200], recipe).cache.own_layers[0].policy.recipe
        return next(stage for stage in found.stages if stage.id == method)

    assert stage().statistics is None
    assert run(["calibrate", method, "--model", str(folder), "--data", str(data)]) == 0
    place = learned_file(method, lm.loaded.model_hash)
    assert stage().statistics == str(place)
    again = tmp_path / "again.safetensors"
    assert run(["calibrate", method, "--model", str(folder), "--data", str(data), "--out", str(again)]) == 0
    assert place.read_bytes() == again.read_bytes()
    ctx = lm.read(TEXT[:600], recipe)
    steps = list(ctx.go_on([5], max_new_tokens=3, keep_logprobs=True))
    assert all(torch.isfinite(step.logprobs).all() for step in steps if step.logprobs is not None)
    ctx.cache.check_integrity()


def test_pieces_do_not_overlap(lm: Any) -> None:
    whole = lm.tokenize(TEXT)
    found = pieces(lm, TEXT, count=5, size=100, seed=1)
    assert [len(piece) for piece in found] == [100] * 5
    starts = [next(i for i in range(0, len(whole), 100) if whole[i : i + 100] == piece) for piece in found]
    assert starts == sorted(set(starts))
    assert found == pieces(lm, TEXT, count=5, size=100, seed=1)
    assert found != pieces(lm, TEXT, count=5, size=100, seed=2)
    assert [len(piece) for piece in pieces(lm, TEXT, count=1, size=10**6, seed=0)] == [2048]  # the model's positions
    with pytest.raises(PromptError, match="at least 64 tokens"):
        pieces(lm, "too short", count=1, size=9, seed=0)


def test_gradients_are_those_of_the_keys_and_values(lm: Any) -> None:
    tokens = lm.tokenize(TEXT)[:40]
    before = [parameter.requires_grad for parameter in lm.model.parameters()]
    found = gradients(lm, tokens)
    seen = look(lm, tokens, Need.ROPE)
    assert len(found) == len(seen) == 3
    for (k, v, k_grad, v_grad), (kv, _) in zip(found, seen, strict=True):
        torch.testing.assert_close(k, kv.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(v, kv.values, atol=1e-5, rtol=1e-4)
        assert (k_grad.shape, v_grad.shape) == (k.shape, v.shape)
        assert v_grad.abs().sum() > 0
    # a small step of the last layer's values along the gradient raises the loss by its square
    ids = torch.tensor([tokens])

    def loss(step: float) -> float:
        module = [m for m in lm.model.modules() if hasattr(m, "v_proj")][-1]
        change = found[-1][3].transpose(0, 1).flatten(1) * step
        handle = module.v_proj.register_forward_hook(lambda m, args, out: out + change)
        with torch.no_grad():
            value = float(lm.model(ids, labels=ids).loss)
        handle.remove()
        return value

    square = float(found[-1][3].square().sum())
    step = 0.05 / square**0.5
    assert (loss(step) - loss(-step)) / (2 * step) == pytest.approx(square, rel=0.05)
    assert [parameter.requires_grad for parameter in lm.model.parameters()] == before
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_layers_that_choose_alike_share_a_choice() -> None:
    mass = torch.rand(2, 5, 32, generator=torch.Generator().manual_seed(0))
    chosen = chosen_pages(mass)
    assert (chosen.sum(-1) == 8).all()  # a quarter
    assert chosen[..., 0].all()
    assert chosen[..., -2:].all()
    other = chosen_pages(mass.flip(-1))
    found = overlap(torch.stack([chosen, chosen, other]))
    assert found[0, 1] == found[2, 2] == 1
    expected = min(float((chosen[h] & other[h]).sum(-1).float().mean()) / 8 for h in range(2))
    assert float(found[0, 2]) == pytest.approx(expected)


def test_training_resumes_as_if_never_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    target = torch.linspace(-1, 1, 12).reshape(3, 4)

    def learn(checkpoint: Path | None, identity: str = "a", stop: int | None = None) -> Any:
        x = {"x": torch.zeros(3, 4)}

        def loss_of(step: int) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            return ((x["x"] - target * (step % 3)) ** 2).sum()

        options = Options(steps=10, identity=identity, checkpoint=checkpoint)
        return training.train(x, loss_of, options, learning_rate=0.1)["x"]

    whole, place = learn(None), tmp_path / "x.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        learn(place, stop=7)
    assert place.exists()
    with pytest.raises(CalibrationError, match="checkpoint of another run"):
        learn(place, identity="b")
    assert torch.equal(learn(place), whole)
    place.write_bytes(b"nonsense")
    with pytest.raises(CalibrationError, match="not a readable safetensors file"):
        learn(place)


@pytest.mark.parametrize(("method", "part"), [("commvq", "fit_rows"), ("kvquant", "_fit")])
def test_calibration_resumes_behind_the_layers_that_it_has(
    method: str, part: str, folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    module = importlib.import_module(LEARNERS[method].module)
    fit, calls = getattr(module, part), [0]

    def breaks_off(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] > 2:
            raise KeyboardInterrupt
        return fit(*args)

    whole, place = tmp_path / "whole", tmp_path / "resumed"
    words = ["calibrate", method, "--model", str(folder), "--data", str(data), "--out"]
    assert run([*words, str(whole)]) == 0
    monkeypatch.setattr(module, part, breaks_off)
    assert run([*words, str(place)]) == 130
    assert "with --resume goes on" in capsys.readouterr().err
    assert not place.exists()
    assert run([*words, str(place), "--resume", "--seed", "1"]) == 2  # of another run
    calls[0] = -100
    assert run([*words, str(place), "--resume"]) == 0
    resumed, calls[0] = calls[0] + 100, -100
    first, second = load_file(whole), load_file(place)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(p.name for p in tmp_path.iterdir() if p != data) == ["resumed", "whole"]
    assert run([*words, str(place)]) == 0
    assert 0 < resumed < calls[0] + 100


def test_a_folder_that_is_not_there_is_told_before_anything_is_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "locret", "--model", "no such model", "--out", str(tmp_path / "missing" / "x.st")]) == 2
    assert "missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["calibrate", "locret"], "write `steno train locret`"),
        (["train", "prefixkv"], "write `steno calibrate prefixkv`"),
        (["calibrate", "hylr"], "did you mean 'hylra'?"),
        (["train", "nonsense"], "valid: locret, trim_kv."),
    ],
)
def test_a_method_of_the_other_command_is_told_where_it_belongs(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(words)
    assert hint in capsys.readouterr().err


def test_training_that_fails_says_so() -> None:
    with pytest.raises(CalibrationError, match="the loss of step 0 is nan"):
        training.train({"x": torch.zeros(1)}, lambda step: torch.tensor(torch.nan), Options(steps=1), learning_rate=1)


def test_passages_depend_on_seed_and_number_alone(lm: Any) -> None:
    first = list(passages(lm, TEXT, seed=3, first=0, last=3))
    assert list(passages(lm, TEXT, seed=3, first=2, last=3)) == first[2:]
    assert next(passages(lm, TEXT, seed=4, first=0, last=1)) != first[0]
    for passage in first:
        assert 0 < passage.num_document_tokens < len(passage.tokens) <= 2048
        document = lm.detokenize(passage.tokens[: passage.num_document_tokens])
        answer = lm.detokenize(passage.tokens).split("assistant\n")[1].split("\n")[0]
        assert answer[:20] in document
    with pytest.raises(PromptError, match="at least 64 words"):
        next(passages(lm, "too short", seed=0, first=0, last=1))
    with pytest.raises(PromptError, match="sentences of at least 12 words"):
        next(passages(lm, "No. " * 100, seed=0, first=0, last=1))


def test_look_sees_what_it_is_asked_for(lm: Any) -> None:
    tokens = lm.tokenize(TEXT[:50])
    seen = look(lm, tokens, Need.QUERIES, Need.HIDDEN_STATES)
    assert len(seen) == 3
    for kv, obs in seen:
        assert kv.keys.shape == (2, 50, 12)
        assert obs.queries.shape == (4, 50, 12)
        assert obs.hidden_states.shape == (50, 48)
        assert obs.attention_mass is None


def toy(queries: torch.Tensor, keys: torch.Tensor) -> tuple[LayerKV, Observation]:
    kv = LayerKV(keys=keys, values=keys, positions=torch.arange(keys.shape[1]))
    return kv, Observation(layer_idx=0, num_layers=1, scaling=1.0, budget_tokens=1, queries=queries)


def test_an_induction_head_is_found() -> None:
    size, generator = 6, torch.Generator().manual_seed(0)
    ids = torch.arange(size).repeat(4)
    codes = torch.eye(size) * 20
    same = codes[ids]
    before = codes[ids.roll(1)]  # a key that says which token came before it
    kv, obs = toy(
        torch.stack([same, same, torch.randn(24, size, generator=generator)]), torch.stack([same, before, same])
    )
    induction, echo = repeated_attention(kv, obs, size, 1), repeated_attention(kv, obs, size, 0)
    assert induction.argmax() == 1
    assert induction[1] > 0.4
    assert echo.argmax() == 0
    # against the whole matrix of attention
    logits = (obs.queries @ kv.keys.mT).masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf).softmax(-1)
    distance = torch.arange(24)[:, None] - torch.arange(24)
    expected = (logits * ((distance > 0) & (distance % size == 0))).sum((1, 2)) / 24
    torch.testing.assert_close(echo, expected)
    expected = (logits * ((distance > 0) & (distance % size == size - 1))).sum((1, 2)) / 24
    torch.testing.assert_close(induction, expected)


def test_locret_labels_find_what_answers_look_at() -> None:
    keys, queries = torch.zeros(1, 20, 4), torch.zeros(2, 20, 4)
    keys[0, 7], queries[1, 17] = 3.0, 3.0
    wanted = labels(*toy(queries, keys), 15)
    assert wanted.shape == (1, 15)
    assert wanted[0].argmax() == 7
    assert wanted.mean().abs() < 1e-5


def test_retained_attention() -> None:
    logits, rows = torch.randn(2, 3, 4, 9), torch.tensor([0, 3, 8, 8])
    plain = retained_logits(logits, torch.zeros(2, 9), rows)
    future = torch.arange(9) > rows[:, None]
    assert torch.equal(plain, logits.masked_fill(future, -torch.inf))
    faded = retained_logits(logits, torch.full((2, 9), -1e4), rows)
    own = torch.arange(9) == rows[:, None]
    assert torch.equal(faded[..., own], logits[..., own])  # a token does not fade for itself
    assert (faded[..., ~own & ~future] == 0).all()


def test_capacity_is_what_is_remembered() -> None:
    assert over_capacity(torch.zeros(3, 50), 50.0) == 0
    forever = over_capacity(torch.zeros(1, 8), 2.0)
    assert forever == pytest.approx(sum(max(0, t + 1 - 2) / (t + 1) for t in range(8)) / 8)
    assert over_capacity(torch.full((1, 8), -50.0), 1.0) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "learner", [x for x in LEARNERS.values() if x.id not in STATISTICS - SHIPPED_STATISTICS], ids=lambda x: x.id
)
def test_what_the_embedded_model_needs_is_shipped(learner: Any) -> None:
    [place] = SHIPPED.glob(f"{learner.id}-*.safetensors")
    about = read_about(place)
    assert place.name == f"{learner.id}-{about['model_hash']}.safetensors"
    assert (about["method"], about["model"]) == (learner.id, DEFAULT_MODEL)
    assert int(about["steps"]) == learner.steps  # the method's docstring says how much it was trained
    made = json.loads((SHIPPED / "made.json").read_text())[place.name]
    assert made["command"] == f"steno {learner.command} {learner.id}"
    assert made["sha256"] == hashlib.sha256(place.read_bytes()).hexdigest()
    assert sum(each.stat().st_size for each in SHIPPED.iterdir()) < 25_000_000
    tensors = load_file(place)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert {len(tensor) for tensor in tensors.values()} == {30}
