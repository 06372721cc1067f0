"""On what a row was measured: versions, commit, processor."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import final

import torch

from steno.version import VERSION


@final
@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a process computes on, looked up once: a checkout may move on while it runs."""

    versions: dict[str, str]
    git_sha: str | None
    host: str
    threads: int

    @classmethod
    def here(cls, device: str) -> Machine:
        return cls(versions=versions(), git_sha=git_sha(), host=host(device), threads=torch.get_num_threads())


def versions() -> dict[str, str]:
    """Versions of what computes the figures."""
    found = {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    return {"steno": VERSION, **found, "python": platform.python_version()}


def git_sha() -> str | None:
    """Commit of the checkout that steno runs from, `-dirty` if tracked files differ; None outside of one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def host(device: str) -> str:
    """The processor in words, e.g. `Intel(R) Xeon(R) CPU @ 2.50GHz, 2 cores, Linux`; on CUDA the device's name before it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = [_processor(), f"{cores} cores", platform.system()]
    if device.startswith("cuda"):
        words.insert(0, torch.cuda.get_device_name(device))
    return ", ".join(words)


def _processor() -> str:
    """Its name, with the generation where a virtual machine leaves the name without a number: times are compared by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    name = told.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in told and not any(character.isdigit() for character in name):
        name += f" (family {told['cpu family']}, model {told['model']})"
    return name
