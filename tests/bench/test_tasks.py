"""The contract of tasks: listing one buys these tests. Then what is special to some of them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import steno
from steno.bench.plan import generate, prompt_tokens
from steno.bench.tasks import FILE_TASKS, GROUPS, TASKS, find_tasks
from steno.bench.tasks.longbench import DATASETS
from steno.bench.tasks.scoring import code_similarity, f1, first_number, match_all, match_any, rouge_l
from steno.bench.tasks.task import Draw, Room, Task, largest
from steno.bench.tasks.text import distinct_words, sentences
from steno.errors import BadArgument, PromptError

SQUAD = {
    "data": [
        {
            "title": str(a),
            "paragraphs": [
                {
                    "context": f"Paragraph {a}-{p} says that the answer is {a}{p}{a}. "
                    + "More words follow here. " * 3,
                    "qas": [
                        {
                            "id": "1",
                            "question": f"What does {a}-{p} say?",
                            "answers": [{"text": f"{a}{p}{a}", "answer_start": 0}],
                        },
                        {"id": "2", "question": "What is not there?", "answers": [], "is_impossible": True},
                    ],
                }
                for p in range(3)
            ],
        }
        for a in range(4)
    ]
}
OWN = {"context": "The key is under the stone.", "question": "Where is the key?", "answers": ["stone", "rock"]}
LONGBENCH = {
    "context": "A long text.",
    "input": "Which?",
    "answers": ["a text"],
    "dataset": "hotpotqa",
    "all_classes": None,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One right file for each task that reads one."""
    root = tmp_path_factory.mktemp("files")
    texts = {
        "qa_1": json.dumps(SQUAD),
        "qa_2": json.dumps(SQUAD),
        "jsonl": "\n".join(
            [json.dumps(OWN), "", json.dumps(OWN | {"question": "Who?", "answers": [], "max_new_tokens": 3})]
        ),
        "longbench": json.dumps(LONGBENCH) + "\n",
        "perplexity": "\n".join(f"Line {i} of a text that goes on, {i * i}." for i in range(400)),
    }
    for name, text in texts.items():
        (root / name).write_text(text, encoding="utf-8")
    return {name: root / name for name in texts}


def tasks() -> list[str]:
    return [*TASKS, *(f"{name}:" for name in FILE_TASKS)]


def task_of(name: str, files: dict[str, Path]) -> Task:
    kind = name.removesuffix(":")
    [task] = find_tasks(f"{name}{files[kind]}" if name.endswith(":") else name)
    return task


@pytest.mark.parametrize("name", tasks())
@pytest.mark.parametrize("context_tokens", [2048, 3333])
def test_instances_fit_and_are_reproducible(
    lm: steno.LanguageModel, files: dict[str, Path], name: str, context_tokens: int
) -> None:
    task = task_of(name, files)
    count = task.num_instances(3)
    assert 1 <= count <= max(3, len(generate(lm, task, context_tokens, 3, 0)))
    instances = generate(lm, task, context_tokens, 3, 0)
    assert instances == generate(lm, task, context_tokens, 3, 0)
    for instance in instances:
        assert instance.context.strip()
        assert bool(instance.queries) != bool(instance.continuation)
        lengths = [
            prompt_tokens(lm, instance)
            + len(lm.question_tokens(q.question))
            + len(lm.tokenize(lm.template.after + q.answer_prefix))
            + q.max_new_tokens
            for q in instance.queries
        ] or [prompt_tokens(lm, instance) + 1 + instance.continuation_tokens]
        if task.takes_context and not name.startswith("qa_"):
            assert 0.75 * context_tokens < max(lengths) <= context_tokens
        elif task.takes_context:
            assert max(lengths) <= context_tokens
    if task.takes_context and not name.endswith(":"):
        assert instances != generate(lm, task, context_tokens, 3, 1)


@pytest.mark.parametrize("name", tasks())
def test_right_answers_score_one_and_wrong_ones_less(
    lm: steno.LanguageModel, files: dict[str, Path], name: str
) -> None:
    task = task_of(name, files)
    for instance in generate(lm, task, 2048, 2, 0):
        for query in instance.queries:
            if query.answers:
                assert task.score(" so: " + ", ".join(query.answers), query.answers) > (
                    0.5 if "longbench" in name else 0.99
                )
                assert task.score("", query.answers) == 0
                assert task.score("nothing of the kind", query.answers) == 0


@pytest.mark.parametrize("name", [n for n in TASKS if n.startswith("niah")])
def test_needles_lie_in_the_haystack(lm: steno.LanguageModel, name: str) -> None:
    for instance in generate(lm, TASKS[name], 2500, 3, 5):
        [query] = instance.queries
        assert all(instance.context.count(answer) == 1 for answer in query.answers)
        assert all(answer not in query.question + query.answer_prefix for answer in query.answers)
        for answer in query.answers:
            [key] = re.findall(rf"for ([\w-]+) is: {answer}\.", instance.context)
            assert key in query.question


def test_depths_of_the_grid_are_even_and_true(lm: steno.LanguageModel) -> None:
    instances = generate(lm, TASKS["niah"], 4096, 5, 0)
    assert [instance.depth for instance in instances] == [0, 0.25, 0.5, 0.75, 1]
    for instance in instances:
        body = instance.context.split("afterwards.\n")[1]
        assert body.index(instance.queries[0].answers[0]) / len(body) == pytest.approx(instance.depth, abs=0.12)


def test_the_chain_leads_to_every_name(lm: steno.LanguageModel) -> None:
    [instance] = generate(lm, TASKS["vt"], 4000, 1, 3)
    [query] = instance.queries
    value = re.search(r"value (\d+) in", query.question)
    assert value is not None
    holders = {value[1]}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", instance.context):
        if source in holders:
            holders.add(name)
    assert holders - {value[1]} == set(query.answers)
    assert len(query.answers) == 5


@pytest.mark.parametrize(("context_tokens", "often", "rarely"), [(3000, 6, 1), (9000, 30, 3)])
def test_common_words_are_the_most_common(
    lm: steno.LanguageModel, context_tokens: int, often: int, rarely: int
) -> None:
    [instance] = generate(lm, TASKS["cwe"], context_tokens, 1, 0)
    listed = re.findall(r"\d+\. ([\w-]+)", instance.context.rsplit("Below is", 1)[1])
    counts = {word: listed.count(word) for word in set(listed)}
    assert {word for word, count in counts.items() if count == often} == set(instance.queries[0].answers)
    assert set(counts.values()) <= {often, rarely}


def test_frequent_words_are_the_most_frequent(lm: steno.LanguageModel) -> None:
    [instance] = generate(lm, TASKS["fwe"], 4000, 1, 0)
    coded = instance.context.split("coded words. ")[1].split()
    counts = {word: coded.count(word) for word in set(coded)}
    top = sorted(counts, key=lambda word: -counts[word])
    assert top[0] == "..."
    assert tuple(top[1:4]) == instance.queries[0].answers


@pytest.mark.parametrize(("kind", "own"), [("qa_1", 1), ("qa_2", 3)])
def test_documents_of_the_question_are_there(
    lm: steno.LanguageModel, files: dict[str, Path], kind: str, own: int
) -> None:
    task = task_of(f"{kind}:", files)
    for instance in generate(lm, task, 1500, 12, 0):
        [query] = instance.queries
        wanted = re.search(r"What does (\d)-(\d) say", query.question)
        assert wanted is not None
        assert f"Paragraph {wanted[1]}-{wanted[2]} says" in instance.context
        assert instance.context.count(f"Paragraph {wanted[1]}-") >= own
        numbers = [int(n) for n in re.findall(r"Document (\d+):", instance.context)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) > own


def test_own_prompts_are_taken_as_they_are(files: dict[str, Path]) -> None:
    first, second = task_of("jsonl:", files).instances  # type: ignore[attr-defined]
    assert (first.context, first.queries[0].question, first.queries[0].answers) == (
        *list(OWN.values())[:2],
        ("stone", "rock"),
    )
    assert (second.queries[0].answers, second.queries[0].max_new_tokens) == ((), 3)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("jsonl", json.dumps(OWN) + "\n{broken", r"jsonl, line 2: not JSON"),
        ("jsonl", "\n\n[1]", r"line 3: must be an object; got list"),
        (
            "jsonl",
            json.dumps({"context": "a", "answers": []}),
            r"line 1: `question` must be non-empty text; got nothing",
        ),
        (
            "jsonl",
            json.dumps(OWN | {"answers": [1]}),
            r"line 1: `answers` must be a list of non-empty texts; got \[1\]",
        ),
        (
            "jsonl",
            json.dumps(OWN | {"max_new_tokens": 0}),
            r"line 1: `max_new_tokens` must be a whole number >= 1; got 0",
        ),
        ("jsonl", "\n", "has no lines"),
        (
            "longbench",
            json.dumps(LONGBENCH | {"dataset": "hotpot"}),
            r"line 1: unknown dataset 'hotpot'; did you mean 'hotpotqa'",
        ),
        (
            "longbench",
            json.dumps(LONGBENCH) + "\n" + json.dumps(LONGBENCH | {"dataset": "trec"}),
            "line 2: the file has",
        ),
        ("longbench", json.dumps(LONGBENCH | {"answers": []}), r"line 1: `answers` is empty"),
        ("qa_1", "{}", "not in SQuAD's format: KeyError: 'data'"),
        ("qa_1", '{"data": 3', "line 1: not JSON"),
        ("qa_2", '{"data": []}', "no question with an answer"),
        ("perplexity", " \n", "is empty"),
    ],
)
def test_broken_files_are_told_with_file_and_line(tmp_path: Path, kind: str, text: str, message: str) -> None:
    path = tmp_path / kind
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PromptError, match=message) as caught:
        find_tasks(f"{kind}:{path}")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nia", "unknown task 'nia'; did you mean 'niah'"),
        ("jsonl", "write `jsonl:FILE`"),
        ("json:x", "unknown task 'json:x'.*did you mean 'jsonl'"),
        ("jsonl:/no/such", "no such file: /no/such"),
        ("jsonl:/", "/ is a folder"),
    ],
)
def test_unknown_tasks(name: str, message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        find_tasks(name)


def test_groups() -> None:
    assert len(GROUPS["ruler"]) == 11
    assert [task.id for task in find_tasks("all")] == list(TASKS)


def test_too_short_a_context_says_so(lm: steno.LanguageModel) -> None:
    with pytest.raises(PromptError, match="a context of 300 tokens is too short"):
        generate(lm, TASKS["cwe"], 300, 1, 0)


@given(st.integers(0, 500), st.integers(0, 600), st.integers(1, 2000))
@settings(deadline=None)
def test_largest_finds_the_border(border: int, at_most: int, guess: int) -> None:
    assert largest(lambda n: n <= border, None, 1) == border
    assert largest(lambda n: n <= border, at_most, 1, guess) == min(border, at_most)
    asked: list[int] = []
    assert largest(lambda n: asked.append(n) or n <= border, None, 1, guess) == border  # type: ignore[func-returns-value]
    assert len(asked) < 40


@given(st.integers(0, 10**6), st.integers(0, 3000))
@settings(deadline=None, max_examples=25)
def test_sentences_have_their_words(start: int, num_words: int) -> None:
    assert len(" ".join(sentences(start, num_words)).split()) == num_words


def test_distinct_words_never_run_out() -> None:
    for count in (10, 5000):
        words = distinct_words(random.Random(0), count)
        assert len(set(words)) == len(words) == count


def test_draws_differ_by_index_and_length() -> None:
    draws = [Draw.of("niah", 0, context, index, 3).rng.random() for context in (512, 1024) for index in range(3)]
    assert len(set(draws)) == 6


def test_measures() -> None:
    assert match_all("A b", ["a", "c"]) == 0.5
    assert match_any("A b", ["a", "c"]) == 1
    assert f1("The Cat, sat!", ["a cat sat down"]) == pytest.approx(2 * 2 / 5)
    assert f1("天空是蓝", ["天空"]) == pytest.approx(2 * 2 / 6)
    assert rouge_l("a x b c", ["a b y c"]) == pytest.approx(2 * 3 / 8)
    assert first_number("There are 3, or 4.", ["3"]) == 0.5
    assert first_number("none", ["3"]) == 0
    assert code_similarity("# note\nreturn x\n", ["return x"]) == 1
    assert all(measure("right words 12", ["right words 12"]) == 1 for measure, _ in DATASETS.values())
    assert all(measure("quite other", ["12"]) < 0.3 for measure, _ in DATASETS.values())


def test_room_counts_as_the_model_does(lm: steno.LanguageModel) -> None:
    assert Room(lm, 100).count("äb<|im_start|>") == 3 + len("<|im_start|>")
