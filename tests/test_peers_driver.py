"""The driver of the peer benchmark: peers that are missing, skip, crash or hang, and what it makes of an answer."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]

GOOD = """
import json, sys
if "--list" in sys.argv:
    print("first\\nsecond")
else:
    request = json.load(sys.stdin)
    timeline = {"prefill_s": 1.0, "step_s": [0.1, 0.2, 0.3], "tokens": [[1, 2, 3, request["rows"]]]}
    print(json.dumps({"timeline": timeline, "kv_bytes": 10, "peak_rss": 20}))
"""
CRASHES = """
import os, sys
if "--list" in sys.argv:
    print("only")
else:
    print("about to die", file=sys.stderr, flush=True)
    os.abort()
"""
SKIPS = """
import json, sys
print("only" if "--list" in sys.argv else json.dumps({"skipped": "not here", "peak_rss": 20}))
"""
HANGS = """
import sys, time
if "--list" in sys.argv:
    print("only")
else:
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def driver() -> ModuleType:
    # by its path: with benchmarks/ on sys.path, its kernels.py would be found where transformers looks for a package
    spec = importlib.util.spec_from_file_location("peers_driver", ROOT / "benchmarks/peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def peer(driver: ModuleType, tmp_path: Path) -> Callable[[str, str], object]:
    def make(name: str, source: str) -> object:
        worker = tmp_path / f"run_{name}.py"
        worker.write_text(source)
        return driver.Peer(name=name, python=Path(sys.executable), worker=worker)

    return make


def test_a_missing_peer_is_left_out(driver: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers = driver.find_peers(["vllm"], tmp_path)
    assert list(driver.bench(peers, {})) == []
    assert "vllm: not installed" in capsys.readouterr().err


def test_a_crash_is_a_row_and_the_others_are_measured(driver: ModuleType, peer: Callable[[str, str], object]) -> None:
    peers = [peer("bad", CRASHES), peer("broken", "1 / 0"), peer("other", SKIPS), peer("good", GOOD)]
    crashed, broken, skipped, first, second = driver.bench(peers, {"rows": 7})
    assert "about to die" in crashed["failed"]
    assert "ZeroDivisionError" in broken["failed"]
    assert skipped["skipped"] == "not here"
    assert (first["configuration"], second["configuration"]) == ("first", "second")
    assert first["timeline"]["tokens"] == [[1, 2, 3, 7]]


def test_a_worker_that_hangs_is_stopped(driver: ModuleType, peer: Callable[[str, str], object]) -> None:
    (row,) = driver.bench([peer("slow", HANGS)], {}, timeout_s=1)
    assert row["failed"] == "not done after 1 s"


def test_only_matching_configurations_run(driver: ModuleType, peer: Callable[[str, str], object]) -> None:
    (row,) = driver.bench([peer("good", GOOD)], {"rows": 1}, match="sec")
    assert row["configuration"] == "second"


def test_a_row_is_summarized_against_the_reference(driver: ModuleType) -> None:
    timeline = {"prefill_s": 1.0, "step_s": [0.1, 0.2, 0.3], "tokens": [[1, 2, 3, 4]]}
    row = driver.summarize({"peer": "x", "configuration": "y", "timeline": timeline}, [[1, 2, 3, 9], [5, 5, 5, 5]])
    assert row["median_s"] == pytest.approx(0.2)
    assert row["equal_tokens"] == 0.75  # of the one row that was decoded
    assert "timeline" not in row


def test_the_reference_must_have_the_same_shape(driver: ModuleType) -> None:
    row = {"peer": "steno", "configuration": "full", "rows": 8, "prompt_tokens": 64, "tokens": [[1]]}
    assert driver.reference_tokens([row], {"rows": 8, "prompt_tokens": 64}) == [[1]]
    assert driver.reference_tokens([row], {"rows": 1, "prompt_tokens": 64}) is None


@pytest.mark.parametrize("name", ["libllama", "llamacpp", "openvino", "steno", "transformers", "vllm"])
def test_every_peer_has_a_worker_and_requirements(driver: ModuleType, name: str) -> None:
    assert name in driver.NAMES
    assert (driver.WORKERS / f"run_{name}.py").exists()
    assert (driver.WORKERS / f"{name}.txt").exists() == (name != "steno")  # which has the project's own environment
