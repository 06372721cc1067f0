"""lm-evaluation-harness drives steno on a small task from a local file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval.evaluator", reason="the extra `lm-eval` is not installed")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from steno.bench.lm_eval import StenoLM
from steno.errors import BadArgument

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
"""
CHOICE = """
doc_to_choice: ["yes", "no", "perhaps"]
doc_to_target: answer
metric_list: [{metric: acc}]
"""
ANSWER = """
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": f"The {n}th text goes on and on. " * 5 + "Is it so? Answer:", "answer": n % 3} for n in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind, rest in (("tiny_choice", "multiple_choice", CHOICE), ("tiny_answer", "generate_until", ANSWER)):
        head = TASK.format(name=name, file=folder / "rows.jsonl", cache=folder / "cache", kind=kind)
        (folder / f"{name}.yaml").write_text(head + rest)
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(tasks: Any, folder: Path, recipe: str) -> dict[str, Any]:
    result = simple_evaluate(
        model="steno",
        model_args=f"pretrained={folder},recipe={recipe},dtype=float32",
        tasks=["tiny_choice", "tiny_answer"],
        task_manager=tasks,
        bootstrap_iters=0,
        log_samples=True,
    )
    return {name: [sample["filtered_resps"] for sample in samples] for name, samples in result["samples"].items()}


def test_the_harness_scores_what_the_model_says(tasks: Any, folder: Path) -> None:
    found = evaluate(tasks, folder, "full")
    lm = StenoLM(pretrained=str(folder), dtype="float32")
    text = "The 0th text goes on and on. " * 5 + "Is it so? Answer:"
    context, wanted = lm.tok_encode(text), lm.tok_encode(" yes")
    with torch.inference_mode():
        logits = lm.lm.model(torch.tensor([context + wanted]), use_cache=False).logits[0, len(context) - 1 : -1]
    expected = float(logits.log_softmax(-1).gather(1, torch.tensor(wanted)[:, None]).sum())
    assert float(found["tiny_choice"][0][0][0]) == pytest.approx(expected, abs=1e-3)
    assert len(found["tiny_choice"]) == len(found["tiny_answer"]) == 4
    packed = evaluate(tasks, folder, "snapkv(window=16) @ 50%")
    assert packed["tiny_choice"] != found["tiny_choice"]


def test_short_contexts_and_rolling_windows(folder: Path) -> None:
    lm = StenoLM(pretrained=str(folder), recipe="snapkv @ 70", dtype="float32")
    [(logprob, _)] = lm._loglikelihood_tokens(
        [(("", "ab"), [lm.prefix_token_id], lm.tok_encode("ab"))], disable_tqdm=True
    )
    assert logprob < 0
    with pytest.raises(BadArgument, match="steno bench --task perplexity"):
        lm.loglikelihood_rolling([])
