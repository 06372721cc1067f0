"""Mutated `.steno` files: no crash, no hang, no large allocation, never a wrong answer without an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "run_mutations.py"


def run(count: int, seed: int, measure: int) -> dict[str, object]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, str(SCRIPT), "--count", str(count), "--seed", str(seed), "--measure", str(measure)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told: dict[str, object] = json.loads(done.stdout)
    return told


def check(told: dict[str, object], count: int) -> None:
    outcomes = told["outcomes"]
    assert isinstance(outcomes, dict)
    assert sum(outcomes.values()) == count
    assert outcomes["DamagedFile"] > count / 4
    assert outcomes["other"] > 0, "files whose digests were made right must reach the decoder"


def test_a_thousand_mutated_files() -> None:
    check(run(1000, seed=1, measure=20), 1000)


@pytest.mark.slow
def test_a_hundred_thousand_mutated_files() -> None:
    check(run(100_000, seed=2, measure=20), 100_000)
