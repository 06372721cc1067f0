"""Rows on a tiny model: what they hold, that they survive, and that they can be measured again from their own fields."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import steno
from steno.bench import machine
from steno.bench.measure import forced_passes
from steno.bench.plan import Group, plan_groups
from steno.bench.rows import Row, append_row, drop_torn_line, read_rows
from steno.bench.run import Bench, open_rows, run, todo, work_tokens
from steno.bench.summary import Subject
from steno.errors import BadArgument, BudgetError, PromptError

RECIPES = ["full", "int4", "snapkv(window=16) @ 40%", "tova @ 200"]
PLAN: dict[str, Any] = {
    "recipes": RECIPES, "tasks": ["niah", "perplexity"], "contexts": [500], "protocols": ["unseen", "seen"],
    "samples": 2, "seed": 3,
}  # fmt: skip


def quiet(tokens: int) -> None:
    pass


@pytest.fixture(scope="module")
def bench(lm: steno.LanguageModel) -> Bench:
    return Bench(subject=Subject.of(lm, "tiny", 3))


@pytest.fixture(scope="module")
def groups(lm: steno.LanguageModel) -> list[Group]:
    return plan_groups(lm, **PLAN)


@pytest.fixture(scope="module")
def finished(
    bench: Bench, groups: list[Group], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Row], int]:
    """The rows of the whole plan, the file they are in, and the tokens that the progress bar was told."""
    out = tmp_path_factory.mktemp("rows")
    told: list[int] = []
    left = todo(groups, open_rows(out, bench.subject.experiment, groups, resume=False))
    rows = list(run(bench, left, out / "rows.jsonl", told.append))
    assert sum(told) == work_tokens(left)
    return out, rows, sum(told)


def test_a_row_for_each_recipe_task_and_protocol(finished: tuple[Path, list[Row], int]) -> None:
    out, rows, _ = finished
    assert [row.cell for row in rows] == [
        (recipe, task, protocol, 500)
        for task, protocol in (("niah", "unseen"), ("niah", "seen"), ("perplexity", "none"))
        for recipe in RECIPES
    ]
    assert read_rows(out / "rows.jsonl") == rows


def test_what_rows_say(finished: tuple[Path, list[Row], int], lm: steno.LanguageModel) -> None:
    for row in finished[1]:
        assert row.score_low <= row.score <= row.score_high
        assert row.difference_low <= row.difference <= row.difference_high
        assert row.difference == pytest.approx(row.score - row.score_full)
        assert row.samples == len(row.scores) == len(row.scores_full) == 2
        assert row.kv_bytes_full == pytest.approx(row.prompt_tokens * 3 * 2 * 2 * 12 * 4, rel=0.01)
        assert row.bits_per_value == pytest.approx(32 * row.kv_bytes / row.kv_bytes_full, rel=1e-3)
        assert row.kv_bytes_peak >= row.kv_bytes
        assert (row.depths is None) == (row.task == "perplexity")
        assert row.prefill_s > 0
        assert row.decode_ms_per_token is not None
        assert row.decode_ms_per_token_quartiles[0] <= row.decode_ms_per_token <= row.decode_ms_per_token_quartiles[1]
        assert row.model_hash == lm.loaded.model_hash
        if row.recipe == "full":
            assert (row.kl, row.top1_agreement, row.difference) == (0, 1, 0)
            assert not row.frees_memory
        else:
            assert row.kl is not None
            assert row.kl > 1e-6
            assert row.kl_low <= row.kl <= row.kl_high
            assert 0 <= row.top1_agreement < 1.01
            assert row.kv_bytes < row.kv_bytes_full
        if row.task == "perplexity":
            assert row.new_tokens == 256
            assert 1 / row.perplexity == pytest.approx(row.score, rel=0.05)
        else:
            assert row.perplexity is None


def test_evicting_while_decoding_holds_its_budget_at_the_end(finished: tuple[Path, list[Row], int]) -> None:
    by_recipe = {row.recipe: row for row in finished[1] if row.task == "perplexity"}
    evicting, full = by_recipe["tova @ 200"], by_recipe["full"]
    assert evicting.kv_bytes_end < evicting.kv_bytes * 1.1
    assert full.kv_bytes_end > full.kv_bytes * 1.8


def test_drift_is_that_of_the_definition(
    bench: Bench, groups: list[Group], finished: tuple[Path, list[Row], int]
) -> None:
    lm, [group] = bench.subject.lm, [g for g in groups if g.task.id == "perplexity"]
    row = next(row for row in finished[1] if row.task == "perplexity" and row.recipe == "int4")
    kls, agreed, nats = [], [], []
    for instance in group.instances:
        tokens = lm.tokenize(instance.continuation, literal=True)[:257]
        p, q = (
            torch.cat(
                [
                    s.logprobs.double()
                    for s in lm.read(instance.context, recipe).follow_text(tokens, passes=forced_passes(timed=True))
                ]
            )
            for recipe in ("full", "int4")
        )
        kls.append(sum(float((a.exp() * (a - b)).sum()) for a, b in zip(p, q, strict=True)) / 256)
        agreed += [int(a.argmax()) == int(b.argmax()) for a, b in zip(p, q, strict=True)]
        nats += [-float(b[token]) for b, token in zip(q, tokens[1:], strict=True)]
    assert row.kl == pytest.approx(sum(kls) / 2, rel=0.02)
    assert row.top1_agreement == pytest.approx(sum(agreed) / 512)
    assert row.perplexity == pytest.approx(2.718281828 ** (sum(nats) / 512), rel=1e-4)


def test_seen_questions_are_part_of_what_is_compressed(finished: tuple[Path, list[Row], int]) -> None:
    unseen, seen = (next(r for r in finished[1] if r.protocol == p and r.recipe == "full") for p in ("unseen", "seen"))
    assert seen.prompt_tokens > unseen.prompt_tokens + 60
    assert seen.instances == unseen.instances


def test_a_row_can_be_measured_again_from_its_fields(bench: Bench, finished: tuple[Path, list[Row], int]) -> None:
    row = finished[1][6]
    assert (row.recipe, row.protocol) == ("snapkv(window=16) @ 40%", "seen")
    [group] = plan_groups(
        bench.subject.lm, recipes=[row.recipe], tasks=[row.task], contexts=[row.context_tokens],
        protocols=[row.protocol], samples=row.samples, seed=row.seed,
    )  # fmt: skip
    _, references = bench.reference(group, quiet)
    again = bench.row(group, row.recipe, references, quiet)
    same = (
        "instances",
        "scores",
        "scores_full",
        "kls",
        "kl",
        "top1_agreement",
        "kv_bytes",
        "kv_bytes_peak",
        "score_low",
    )
    assert {name: getattr(again, name) for name in same} == {name: getattr(row, name) for name in same}


def test_an_interrupted_run_goes_on(
    bench: Bench, groups: list[Group], finished: tuple[Path, list[Row], int], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    steps = run(bench, todo(groups, []), path, quiet)
    for _ in range(2):
        next(steps)
    steps.close()
    with path.open("a") as file:
        file.write('{"model": "ti')  # what a machine that goes down may leave
    rows = open_rows(tmp_path, bench.subject.experiment, groups, resume=True)
    assert [row.cell for row in rows] == [row.cell for row in finished[1][:2]]
    left = todo(groups, rows)
    assert [len(recipes) for _, recipes in left] == [2, 4, 4]
    rows += run(bench, left[:1], path, quiet)
    assert read_rows(path) == rows
    assert [(row.cell, row.scores) for row in rows] == [(row.cell, row.scores) for row in finished[1][:4]]


def test_nothing_is_left_of_a_finished_run(
    bench: Bench, groups: list[Group], finished: tuple[Path, list[Row], int]
) -> None:
    rows = open_rows(finished[0], bench.subject.experiment, groups, resume=True)
    assert todo(groups, rows) == []


def test_other_rows_are_refused_and_kept(
    bench: Bench, groups: list[Group], finished: tuple[Path, list[Row], int], lm: steno.LanguageModel
) -> None:
    out, before = finished[0], (finished[0] / "rows.jsonl").read_bytes()
    with pytest.raises(BadArgument, match=r"has rows already: go on with --resume"):
        open_rows(out, bench.subject.experiment, groups, resume=False)
    with pytest.raises(BadArgument, match=r"rows of another run \(row 1: seed 3 instead of 4\)"):
        open_rows(out, replace(bench.subject, seed=4).experiment, groups, resume=True)
    others = plan_groups(lm, **PLAN | {"samples": 3})
    with pytest.raises(BadArgument, match=r"other instances of niah \(row 1: 2 samples\)"):
        open_rows(out, bench.subject.experiment, others, resume=True)
    with pytest.raises(BadArgument, match="is a file"):
        open_rows(out / "rows.jsonl", bench.subject.experiment, groups, resume=False)
    assert (out / "rows.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: a row must be an object; got list"),
        ('{"a": 1}', r"line 2: not a row of this version: missing .*model.*unknown a\."),
    ],
)
def test_a_broken_row_is_told_with_file_and_line(
    finished: tuple[Path, list[Row], int], tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, finished[1][0])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(BadArgument, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("score", "1"), ("samples", 1.5), ("seed", True), ("scores", [None]), ("kl", "x"), ("versions", {"a": 1})],
)
def test_a_row_of_wrong_types_is_refused(
    finished: tuple[Path, list[Row], int], tmp_path: Path, name: str, value: object
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(asdict(finished[1][0]) | {name: value}) + "\n")
    with pytest.raises(BadArgument, match=f"line 1: `{name}` must be"):
        read_rows(path)


def test_a_whole_last_line_is_not_dropped(finished: tuple[Path, list[Row], int], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, finished[1][0])
    assert not drop_torn_line(path)
    assert read_rows(path) == finished[1][:1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"contexts": [10_001]}, PromptError, "10001 tokens is longer than tiny, which has 10000 positions"),
        ({"contexts": [0]}, PromptError, "must be >= 1"),
        ({"samples": 0}, BadArgument, "`samples` must be >= 1"),
        ({"recipes": ["snapkv @ 20"]}, BudgetError, "20"),
        ({"tasks": ["nothing"]}, BadArgument, "unknown task"),
    ],
)
def test_wrong_plans(lm: steno.LanguageModel, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_groups(lm, **PLAN | change)


def test_a_plan_has_everything_once(lm: steno.LanguageModel) -> None:
    plan = PLAN | {"recipes": ["full", "full", "int4"], "tasks": ["niah", "niah"], "contexts": [500, 500]}
    groups = plan_groups(lm, **plan)
    assert [(g.protocol, g.recipes) for g in groups] == [("unseen", ("full", "int4")), ("seen", ("full", "int4"))]


def test_odd_prompts_are_answered_or_counted_as_refused(lm: steno.LanguageModel, bench: Bench) -> None:
    [group] = plan_groups(lm, **PLAN | {"tasks": ["stress"], "protocols": ["unseen"]})
    few = replace(group, instances=group.instances[:8], prompt_tokens=group.prompt_tokens[:8])
    full, references = bench.reference(few, quiet)
    assert (full.score, full.refused) == (1, 0)
    assert full.context_tokens == max(few.prompt_tokens)
    exact = bench.row(few, "full @ 100%", references, quiet)
    assert (exact.score, exact.refused, exact.kl) == (1, 0, pytest.approx(0, abs=1e-4))
    tight = bench.row(few, "snapkv @ 70", references, quiet)
    assert 0 < tight.score < 1
    refusing = bench.row(few, "snapkv @ 30%", references, quiet)
    assert refusing.refused > 0
    assert refusing.score <= 1 - refusing.refused / 8
    none = replace(few, instances=few.instances[:1], prompt_tokens=few.prompt_tokens[:1])
    with pytest.raises(BadArgument, match="refuses every prompt of stress"):
        bench.row(none, "snapkv @ 30%", references[:1], quiet)


def test_questions_without_answers_are_measured_by_agreement(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    line = {"context": "A text that is long enough to be packed. " * 8, "question": "What?", "max_new_tokens": 6}
    path.write_text("\n".join(json.dumps(line | {"answers": answers}) for answers in ([], ["no such words"])))
    [group] = plan_groups(bench.subject.lm, **PLAN | {"tasks": [f"jsonl:{path}"], "protocols": ["unseen"]})
    full, references = bench.reference(group, quiet)
    assert full.scores == [1, 0]
    row = bench.row(group, "int4", references, quiet)
    assert row.scores[0] == pytest.approx(sum(row.scores[:1]))
    assert row.task == f"jsonl:{path}"


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("model name\t: AMD EPYC\ncpu family\t: 26\nmodel\t\t: 2\n", "AMD EPYC (family 26, model 2)"),
        ("model name\t: Xeon @ 2.50GHz\ncpu family\t: 6\nmodel\t\t: 85\n", "Xeon @ 2.50GHz"),
        ("model name\t: A core\nmodel name\t: Another\n", "A core"),
    ],
)
def test_processors_of_one_name_are_told_apart(told: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: told)
    assert machine.host("cpu").startswith(f"{name}, ")
