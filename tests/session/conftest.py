"""Tiny random models with a byte tokenizer on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import steno
from tiny import save_with_bytes


@pytest.fixture(scope="package")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A model by architecture and template, loaded once."""
    loaded: dict[tuple[str, bool], Any] = {}

    def get(name: str = "llama", *, template: bool = True) -> Any:
        if (name, template) not in loaded:
            folder = save_with_bytes(tmp_path_factory.mktemp("models") / name, name, template=template)
            loaded[name, template] = steno.load(folder, dtype="fp32")
        return loaded[name, template]

    return get
