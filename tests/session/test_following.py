"""Teacher forcing: an answer or a text that is followed gives the log-probabilities that decoding it gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import DOCUMENT, QUESTION

import steno
from steno.calibration import save_calibration
from steno.errors import BadArgument, PromptError


@pytest.mark.parametrize(
    "recipe",
    ["full", "int4", "snapkv(window=16) @ 60%", "tova @ 100", "quest(tokens=192)", "sentencekv(tokens=100, sinks=4)"],
)
def test_following_its_own_answer_gives_the_same_log_probabilities(load: Callable[..., Any], recipe: str) -> None:
    ctx = load().read(DOCUMENT, recipe)
    steps = list(ctx.ask(QUESTION, max_new_tokens=70, answer_prefix=" It", keep_logprobs=True))
    tokens = [token for step in steps for token in step.token_ids]
    followed = list(ctx.follow_answer(tokens, QUESTION, answer_prefix=" It"))
    assert [token for step in followed for token in step.token_ids] == tokens
    own = [step.logprobs for step in steps if step.logprobs is not None]
    assert torch.equal(torch.cat([step.logprobs for step in followed]), torch.cat(own))


@pytest.mark.parametrize("recipe", ["full", "snapkv(window=16) @ 60%", "int8"])
def test_following_several_tokens_in_a_pass_gives_the_same(load: Callable[..., Any], recipe: str) -> None:
    lm = load()
    ctx = lm.read(DOCUMENT, recipe)
    tokens = lm.tokenize("So it goes. " * 30)[:40]
    one = torch.cat([step.logprobs for step in ctx.follow_answer(tokens, QUESTION)])
    steps = list(ctx.follow_answer(tokens, QUESTION, passes=[1, 1, 7, 16, 64]))
    assert [len(step.token_ids) for step in steps] == [1, 1, 7, 16, 15]
    assert [token for step in steps for token in step.token_ids] == tokens
    # a page that is full closes at the end of a pass, so it may be read in whole numbers a little later
    assert torch.allclose(torch.cat([step.logprobs for step in steps]), one, atol=1e-2 if recipe == "int8" else 1e-4)
    assert not list(ctx.follow_answer([], QUESTION))
    for wrong in ([39], [1, 0, 39]):
        with pytest.raises(BadArgument, match="passes"):
            list(ctx.follow_answer(tokens, QUESTION, passes=wrong))


@pytest.mark.parametrize(
    ("recipe", "acts"),
    [("full", False), ("snapkv | kivi @ 50%", False), ("all", False), ("tova @ 100", True), ("int8 | quest", True)],
)
def test_what_acts_at_each_step(recipe: str, acts: bool) -> None:
    assert steno.parse_recipe(recipe).acts_at_each_step == acts


@pytest.mark.parametrize(
    "access",
    [
        "quest(tokens=64, dense_layers=0)", "double_sparsity(tokens=60)", "sentencekv(tokens=100, sinks=8, offload=True)",
        "delta(tokens=128, recent=64, full_layers='0')", "hylra(tokens=128, sinks=0, recent=64, weights='PLAN')",
        "moba(blocks=3)",
    ],
    ids=lambda access: access.split("(")[0],
)  # fmt: skip
def test_access_methods_decode_on_behind_others(load: Callable[..., Any], tmp_path: Path, access: str) -> None:
    save_calibration(tmp_path / "plan", {"source_layer": torch.tensor([-1.0, 1.0, 1.0])}, {})
    lm = load()
    recipe = f"snapkv(window=16) | adakv | int8 | {access.replace('PLAN', str(tmp_path / 'plan'))} @ 70%"
    ctx = lm.read(DOCUMENT, recipe)
    forced = lm.tokenize("So it goes. " * 30)[:256]
    steps = ctx.follow_answer(forced, QUESTION)
    made = [(token, step.logprobs) for step in steps for token in step.token_ids]
    assert [token for token, _ in made] == forced
    assert all(bool(torch.isfinite(logprobs).all()) for _, logprobs in made)
    steps.cache.check_integrity()
    assert (ctx.report().kv_bytes_offloaded > 0) == ("offload" in access)
    assert ("not in memory" in str(ctx.report())) == ("offload" in access)


def test_following_text_is_teacher_forcing(load: Callable[..., Any]) -> None:
    lm = load()
    continuation = lm.tokenize(" And so on, until the end of it.")
    ctx = lm.read(DOCUMENT)
    got = torch.cat([step.logprobs for step in ctx.follow_text(continuation)])
    whole = torch.tensor([ctx.tokens + continuation])
    lm.model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        logits = lm.model(whole).logits[0]
    lm.model.set_attn_implementation("steno")
    expected = logits[len(ctx.tokens) : -1].log_softmax(-1)
    assert got.shape == (len(continuation) - 1, expected.shape[1])
    assert torch.allclose(got, expected, atol=1e-4)
    with pytest.raises(PromptError, match="at least 2 tokens"):
        ctx.follow_text(continuation[:1])
