"""A tiny random model with a tokenizer of one token a byte."""

from __future__ import annotations

from pathlib import Path

import pytest

import steno
from tiny import save_with_bytes


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model on disk. Read only."""
    return save_with_bytes(tmp_path_factory.mktemp("bench") / "tiny", "llama", positions=10_000)


@pytest.fixture(scope="session")
def lm(folder: Path) -> steno.LanguageModel:
    return steno.load(folder, dtype="fp32")
