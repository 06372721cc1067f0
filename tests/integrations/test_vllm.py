"""The connector in a real vLLM (its CPU build, `make test-vllm`): hits after a restart, damage, tenants, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from steno.store.store import Store

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".peers/vllm/bin/python"
BLOCK = 32
PROMPT = [3 + 7 * i % 89 for i in range(10 * BLOCK + 5)]

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .peers/vllm: `make test-vllm` installs it"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"hidden_size": 128, "head_dim": 32, "num_hidden_layers": 2, "vocab_size": 128, "intermediate_size": 96}
    model = tiny.build("llama", **sizes)
    model.generation_config.pad_token_id = None
    model.to(dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def start(
    model: Path, store: Path, *prompts: list[int], more: tuple[str, ...] = (), status: int = 0
) -> tuple[Any, str]:
    """What one process of vLLM answers, and what it says on the way."""
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    argv = [str(PYTHON), str(Path(__file__).parent / "run_vllm.py"), str(model), str(store)]
    done = subprocess.run(
        [*argv, "--prompts", json.dumps(prompts), *more],
        capture_output=True, text=True, check=False, timeout=900, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert (done.returncode == 0) == (status == 0), said[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return (json.loads(lines[0].removeprefix("RESULT ")) if lines else None), said


def test_blocks_outlive_vllm_and_a_flipped_bit_is_computed_again(model: Path, tmp_path: Path) -> None:
    other = [*PROMPT[: 4 * BLOCK], *reversed(PROMPT)]
    cold, _ = start(model, tmp_path, PROMPT, PROMPT, other)
    assert [answer["cached"] or 0 for answer in cold] == [0, 10 * BLOCK, 4 * BLOCK]
    assert cold[1]["tokens"] == cold[0]["tokens"]
    entries = Store(tmp_path).entries()
    assert len(entries) == 10 + len(other) // BLOCK - 4
    warm, said = start(model, tmp_path, PROMPT, other)
    assert [answer["tokens"] for answer in warm] == [cold[0]["tokens"], cold[2]["tokens"]]
    assert [answer["cached"] for answer in warm] == [10 * BLOCK, len(other) // BLOCK * BLOCK]
    assert "cannot be loaded" not in said
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.chunk")}
    oldest_first = [next(tmp_path.rglob(entry.name)) for entry in entries]
    for path in oldest_first[2:9:3]:
        data = bytearray(before[path])
        data[len(data) * 3 // 4] ^= 4
        path.write_bytes(data)
    again, said = start(model, tmp_path, PROMPT, other)
    assert "cannot be loaded" in said
    assert [answer["tokens"] for answer in again] == [cold[0]["tokens"], cold[2]["tokens"]]
    last, said = start(model, tmp_path, PROMPT, other)
    assert "cannot be loaded" not in said, "what was damaged was stored again"
    assert [answer["tokens"] for answer in last] == [cold[0]["tokens"], cold[2]["tokens"]]
    assert last[0]["cached"] == 10 * BLOCK
    salted, _ = start(model, tmp_path, PROMPT, more=("--salt", "another"))
    assert not salted[0]["cached"], "another salt is another tenant"
    assert salted[0]["tokens"] == cold[0]["tokens"]


def test_unknown_layouts_are_refused(model: Path, tmp_path: Path) -> None:
    _, said = start(model, tmp_path, PROMPT, more=("--kv-dtype", "fp8"), status=1)
    assert "plain caches" in said
