"""README keeps its promises: its size, and the Python that it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import steno
from steno.models.embedded import DEFAULT_MODEL
from steno.models.folder_cache import default_cache_dir, is_complete

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_readme_names_every_method() -> None:
    from steno.methods import METHODS

    assert all(f"`{name}`" in README for name in METHODS)


def test_files_that_readme_names_exist() -> None:
    named = re.findall(r"`((?:docs|benchmarks)/[\w./]+)`", README)
    assert named
    assert all((ROOT / name).exists() for name in named)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.skipif(not is_complete(default_cache_dir() / DEFAULT_MODEL), reason="`make model` fetches the model")
def test_the_first_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(import steno\n.*?)```", README, re.S)
    assert code is not None
    exec(compile(code[1], "README.md", "exec"), {"steno": steno})
    assert "memory:" in capsys.readouterr().out
