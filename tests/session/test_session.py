"""Reading a document and asking about it, on tiny random models with a byte tokenizer on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from asking import DOCUMENT, QUESTION, answer

from steno.decode.sampler import Sampling
from steno.errors import BadArgument, BudgetError, PromptError, RecipeError
from tiny import TOKENS

RECIPES = [
    "full", "int4", "snapkv(window=16) | adakv | kivi(bits=4) @ 50%", "tova @ 100", "kvzip | adakv @ 40%",
    "look_m @ 50%", "text_prior | vidkv_stp @ 60%", "kvzip(chunk_tokens=50) | int8 @ 60%",
]  # fmt: skip


def layer_states(cache: Any) -> list[torch.Tensor]:
    """What transformers' own layers hold, and what ours do."""
    others = [x.clone() for layer in cache.layers if layer not in cache.own_layers for x in (layer.keys, layer.values)]
    ours = [x for layer in cache.own_layers for pair in layer.content.decode_row(0, torch.float32) for x in pair]
    return others + ours


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("recipe", "template"), [*((recipe, True) for recipe in RECIPES), (RECIPES[-1], False)])
def test_questions_do_not_touch_the_context(load: Callable[..., Any], recipe: str, template: bool) -> None:
    lm = load(template=template)
    ctx = lm.read(DOCUMENT, recipe)
    before, questions = layer_states(ctx.cache), [QUESTION, "Who?", QUESTION]
    together = [answer(ctx, question) for question in questions]
    ctx.cache.check_integrity()
    assert together[0] == together[2] != ""
    assert together[:2] == [answer(lm.read(DOCUMENT, recipe), question) for question in questions[:2]]
    assert same(layer_states(ctx.cache), before)


def test_two_answers_at_the_same_time(load: Callable[..., Any]) -> None:
    ctx = load().read(DOCUMENT, "int4")
    alone = [answer(ctx, question) for question in (QUESTION, "Who?")]
    streams = [ctx.ask(question, max_new_tokens=12) for question in (QUESTION, "Who?")]
    texts = ["", ""]
    for pair in zip(*streams, strict=False):
        texts = [text + step.text for text, step in zip(texts, pair, strict=True)]
    texts = [text + "".join(step.text for step in stream) for text, stream in zip(texts, streams, strict=True)]
    assert texts == alone


def test_answer_is_that_of_transformers(load: Callable[..., Any]) -> None:
    lm = load()
    text = f"{DOCUMENT}\n\n{QUESTION}"
    ids = lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    lm.model.set_attn_implementation("sdpa")
    out = lm.model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    lm.model.set_attn_implementation("steno")
    steps = list(lm.read(DOCUMENT).ask(QUESTION, max_new_tokens=12))
    assert [token for step in steps for token in step.token_ids] == out.tolist()
    assert "".join(step.text for step in steps) == lm.tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.parametrize("recipe", ["kvzip @ 40%", "kvzip(chunk_tokens=70) | adakv | int4 @ 50%", "keydiff @ 40%"])
def test_sliding_layers_stay_clean(load: Callable[..., Any], recipe: str) -> None:
    lm = load("gemma3")
    ctx, full = lm.read(DOCUMENT, recipe), lm.read(DOCUMENT)
    mine, its = (
        [x for layer in c.cache.layers if layer not in c.cache.own_layers for x in (layer.keys, layer.values)]
        for c in (ctx, full)
    )
    assert len(mine) == 4
    # the first sliding layer comes before any compression, so a replay alone could have changed it
    assert same(mine, its)
    before = layer_states(ctx.cache)
    first = answer(ctx)
    assert same(layer_states(ctx.cache), before)
    assert first == answer(ctx) == answer(lm.read(DOCUMENT, recipe))


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("chunk", [37, 120, 2000])
def test_kvzip_keeps_prefix_sinks_and_its_budget(load: Callable[..., Any], chunk: int, template: bool) -> None:
    lm = load(template=template)
    ctx = lm.read(DOCUMENT, f"kvzip(chunk_tokens={chunk}) @ 30%")
    num_tokens, prefix = len(ctx.tokens), lm.prompt_tokens(DOCUMENT)[1]
    assert prefix > 0 or not template
    for layer in ctx.cache.own_layers:
        for positions in layer.content.positions(0, num_tokens):
            assert len(positions) == int(num_tokens * 0.3)
            assert positions[: max(prefix, 4)].tolist() == list(range(max(prefix, 4)))
    assert ctx.cache.seen_tokens == num_tokens
    assert ctx.report().kv_bytes_full == num_tokens * 3 * 2 * 2 * 12 * 4


def test_kvzip_needs_room_for_the_replay(load: Callable[..., Any]) -> None:
    text = "a" * 1050
    load().read(text, "keydiff @ 40%")
    with pytest.raises(PromptError, match=r"free positions; the prompt of \d+ tokens leaves \d+ of 1200"):
        load().read(text, "kvzip @ 40%")


def test_replay_stays_within_the_positions(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load()
    longest = 0

    def watch(model: Any, args: Any, kwargs: Any) -> None:
        nonlocal longest
        longest = max(longest, kwargs["past_key_values"].get_seq_length() + args[0].shape[1])

    handle = lm.model.register_forward_pre_hook(watch, with_kwargs=True)
    lm.read("a" * 700, "kvzip @ 40%")
    handle.remove()
    assert 1000 < longest <= 1200


@pytest.mark.parametrize(("reserve", "over"), [(0, 13), (100, 113)])
def test_too_long_a_document_says_by_how_much(load: Callable[..., Any], reserve: int, over: int) -> None:
    lm = load()
    text = "a" * (1213 - len(lm.prompt_tokens("")[0]))
    with pytest.raises(
        PromptError, match=rf"has 1213 tokens .* {over} more than the 1200 positions .* about {over} tokens"
    ):
        lm.read(text, reserve_tokens=reserve)


def test_too_long_a_question_says_by_how_much(load: Callable[..., Any]) -> None:
    ctx = load().read("a" * 1100)
    with pytest.raises(PromptError, match="1200 positions"):
        ctx.ask("b" * 90)
    with pytest.raises(PromptError, match="1200 positions"):
        ctx.ask("b", max_new_tokens=90)


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_empty_document_and_question(load: Callable[..., Any], text: str) -> None:
    with pytest.raises(PromptError, match="document is empty"):
        load().read(text)
    with pytest.raises(PromptError, match="question is empty"):
        load().read("a").ask(text)


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"stop": "END"}, {"stop": ["a", ""]}])
def test_bad_options_are_named(load: Callable[..., Any], options: dict[str, Any]) -> None:
    [name] = options
    with pytest.raises(PromptError, match=f"`{name}` must be"):
        load().read("a").ask(QUESTION, **options)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("snapkv @ 20", r"20 of .* always keeps 64 .* window\.$"),
        ("chelsea @ 3", r"an argument of recency in `recency\(window=64\) \| chelsea @ 3`"),
        ("keydiff @ 10B", "too little"),
        ("kvzip @ 0.2%", "always keeps 4"),
    ],
)
def test_budget_below_what_is_protected(load: Callable[..., Any], recipe: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        load().read(DOCUMENT, recipe)


def test_bad_recipe_comes_first(load: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError):
        load().read("", "snapvk @ 20")


@pytest.mark.parametrize(
    ("recipe", "noted"), [("tova @ 5000", True), ("kvzip @ 100%", True), ("keydiff @ 50", False), ("int4", False)]
)
def test_a_budget_above_the_prompt_is_noted(load: Callable[..., Any], recipe: str, noted: bool) -> None:
    report = load().read(DOCUMENT, recipe).report()
    assert ("nothing was dropped" in report.note) == noted
    assert ("nothing was dropped" in str(report)) == noted
    assert report.held_tokens_mean == (50 if recipe == "keydiff @ 50" else report.prompt_tokens)
    assert report.kv_bytes <= report.kv_bytes_peak


def test_control_tokens_in_a_document_are_plain_text(load: Callable[..., Any]) -> None:
    lm = load()
    tokens, prefix = lm.prompt_tokens("a<|im_end|>b")
    assert not {0, 1, 2} & set(tokens[prefix:])
    assert lm.tokenizer.decode(tokens[prefix:]) == "a<|im_end|>b"


def test_answer_prefix_stop_and_sampling(load: Callable[..., Any]) -> None:
    ctx = load().read(DOCUMENT)
    whole = answer(ctx, max_new_tokens=40)
    stop = whole[len(whole) // 2]
    assert answer(ctx, max_new_tokens=40, stop=[stop]) == whole[: whole.index(stop)]
    assert answer(ctx, answer_prefix="The") != whole
    seeded = Sampling(temperature=1.0, seed=1)
    assert (
        answer(ctx, sampling=seeded)
        == answer(ctx, sampling=seeded)
        != answer(ctx, sampling=Sampling(temperature=1.0, seed=2))
    )
    assert all(
        step.logprobs.shape == (1, len(TOKENS))
        for step in ctx.ask(QUESTION, max_new_tokens=3, keep_logprobs=True)
        if step.token_ids
    )


def test_progress_reaches_the_end_of_each_part(load: Callable[..., Any]) -> None:
    calls: list[tuple[str, int, int]] = []
    load().read(DOCUMENT, "kvzip @ 40%", progress=lambda *call: calls.append(call))
    assert [call for call in calls if call[1] == call[2]] == [("reading", 3, 3), ("replaying", 3, 3)]


def test_a_context_can_be_continued_by_generate(load: Callable[..., Any]) -> None:
    lm = load()
    ctx = lm.read(DOCUMENT, "int8")
    new = lm.tokenize(lm.template.between + QUESTION + lm.template.after)
    ids = torch.tensor([ctx.tokens + new])
    out = lm.model.generate(ids, past_key_values=ctx.cache.fork(), max_new_tokens=12, do_sample=False)[
        0, ids.shape[1] :
    ]
    assert lm.tokenizer.decode(out, skip_special_tokens=True) == answer(ctx)


def test_progress_only_goes_forward(load) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    load().read(
        DOCUMENT,
        "kvzip(chunk_tokens=50) @ 60%",
        progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)),
    )
    assert set(seen) == {"reading", "replaying"}
    for steps in seen.values():
        total = steps[-1][1]
        assert steps == [(i + 1, total) for i in range(total)]


def test_sentences_end_where_the_tokenizer_writes_their_signs(load: Callable[..., Any]) -> None:
    lm = load()
    ends = lm.sentence_ends
    assert {lm.detokenize([i]) for i in ends} == {".", "!", "?"}
    ctx = lm.read("One. Two! Three", "sentencekv")
    text = ctx.cache.reading.shared.text.rows[0]
    assert int(text[-1]) == 2 + sum(i in ends for i in ctx.tokens[: -len(lm.tokenize("One. Two! Three"))])


@pytest.mark.parametrize("template", [True, False])
def test_a_question_may_be_read_with_the_document(load: Callable[..., Any], template: bool) -> None:
    lm = load(template=template)
    seen, later = lm.read(DOCUMENT, question=QUESTION), lm.read(DOCUMENT)
    assert len(seen.tokens) > len(later.tokens)
    assert answer(seen, None) == answer(later, QUESTION)
    shrunk = lm.read(DOCUMENT, "snapkv(window=16) @ 30%", question=QUESTION)
    assert shrunk.cache.own_layers[0].content.positions(0, len(seen.tokens))[0][-1] == len(seen.tokens) - 1
    with pytest.raises(PromptError, match="read with its question"):
        seen.ask(QUESTION)
    with pytest.raises(PromptError, match="no question"):
        later.ask(None)
    with pytest.raises(PromptError, match="question is empty"):
        lm.read(DOCUMENT, question=" ")


def test_an_answer_holds_the_cache_that_it_grows(load: Callable[..., Any]) -> None:
    ctx = load().read(DOCUMENT)
    answering = ctx.ask(QUESTION, max_new_tokens=5)
    before = answering.cache.seen_tokens
    assert before == len(ctx.tokens)
    tokens = [token for step in answering for token in step.token_ids]
    asked = len(ctx.lm.question_tokens(QUESTION)) + len(ctx.lm.tokenize(ctx.lm.template.after))
    assert answering.cache.seen_tokens == before + asked + len(tokens) - 1
    assert ctx.cache.seen_tokens == before


def test_tokens_are_read_and_continued_without_a_template(load: Callable[..., Any]) -> None:
    lm = load()
    tokens = lm.tokenize(DOCUMENT)
    steps = list(lm.read_tokens(tokens[:-1]).go_on(tokens[-1:], max_new_tokens=8))
    lm.model.set_attn_implementation("sdpa")
    out = lm.model.generate(torch.tensor([tokens]), max_new_tokens=8, do_sample=False)[0, len(tokens) :]
    lm.model.set_attn_implementation("steno")
    assert [token for step in steps for token in step.token_ids] == out.tolist()
    with pytest.raises(PromptError, match="no tokens"):
        lm.read_tokens([])
    with pytest.raises(PromptError, match="1200 positions"):
        lm.read_tokens([5] * 1201)


@pytest.mark.parametrize("recipe", ["snapkv(window=16) | adakv | int4 @ 50%", "kvzip @ 40%", "full"])
def test_a_document_in_chunks_is_the_same_document(load: Callable[..., Any], recipe: str) -> None:
    lm = load()
    whole, parts = lm.read(DOCUMENT, recipe), lm.read(DOCUMENT, recipe, chunk_tokens=70)
    assert parts.cache.held_tokens() == whole.cache.held_tokens()
    assert answer(parts) == answer(whole)


@pytest.mark.parametrize("recipe", ["streaming_llm @ 40", "keydiff | int4 @ 100"])
def test_a_document_that_is_evicted_while_it_is_read(load: Callable[..., Any], recipe: str) -> None:
    lm, seen = load(), []
    ctx = lm.read(DOCUMENT, recipe, chunk_tokens=50, progress=lambda *args: seen.append(args))
    assert ctx.report().kv_bytes_peak < ctx.report().kv_bytes_full
    assert seen[-1][1] == seen[-1][2] == len(lm.model.model.layers) * -(-len(ctx.tokens) // 50)
    assert answer(ctx) != ""
    ctx.cache.check_integrity()
    with pytest.raises(BadArgument, match="chunk_tokens=0"):
        lm.read(DOCUMENT, recipe, chunk_tokens=0)
    with pytest.raises(RecipeError, match="adakv needs the whole prompt"):
        lm.read(DOCUMENT, "keydiff | adakv @ 40%", chunk_tokens=50)
