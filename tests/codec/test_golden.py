"""Golden files: what was written once is read forever, by steno and by a reader that shares no line with it."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from steno.codec.cache import read_tokens, restore_cache
from steno.codec.container import SavedFile
from steno.codec.identity import recipe_of
from steno.models.kvcache import KVCache
from tiny import TOKENS, build

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
READER = ROOT / "examples" / "read_steno.py"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def make() -> ModuleType:
    return module(GOLDEN / "make.py")


@pytest.fixture(scope="module")
def config() -> Any:
    config = build("llama", vocab_size=len(TOKENS), max_position_embeddings=1200).config
    config._attn_implementation = "steno"
    return config


def opened(name: str, config: Any, refinements: int | None = None) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Keys and values of each head of each layer, as steno opens them."""
    file = SavedFile(GOLDEN / f"{name}.steno")
    cache = KVCache(config, recipe_of(file))
    dtype = getattr(torch, file.header["dtype"])
    restore_cache(
        file, cache, num_tokens=len(read_tokens(file)), device=torch.device("cpu"), dtype=dtype, refinements=refinements
    )
    layers = [layer.content.decode_row(0, torch.float32) for layer in cache.own_layers]
    return [[(k.numpy(), v.numpy()) for k, v in heads] for heads in layers]


def test_every_golden_file_is_expected() -> None:
    assert {path.stem for path in GOLDEN.glob("*.steno")} == set(EXPECTED)
    assert sum(path.stat().st_size for path in GOLDEN.iterdir() if path.is_file()) < 1 << 20


@pytest.mark.parametrize("name", EXPECTED)
def test_a_golden_file_holds_what_it_held(name: str, make: ModuleType, config: Any) -> None:
    assert make.stored_digest(GOLDEN / f"{name}.steno") == EXPECTED[name]["stored"]
    found = [make.figures(heads) for heads in opened(name, config)]
    np.testing.assert_allclose(found, EXPECTED[name]["layers"], rtol=2e-3, atol=0.2)
    assert len(read_tokens(SavedFile(GOLDEN / f"{name}.steno"))) == EXPECTED[name]["tokens"]


@pytest.mark.parametrize("refinements", [None, 0])
@pytest.mark.parametrize("name", EXPECTED)
def test_another_reader_reads_the_same(name: str, refinements: int | None, config: Any) -> None:
    header, tokens, layers = module(READER).read(GOLDEN / f"{name}.steno", refinements)
    assert tokens == read_tokens(SavedFile(GOLDEN / f"{name}.steno"))
    own, is_exact = opened(name, config, refinements), header["level"] == "lossless"
    close = 1e-5 if "hadamard" in header["recipe"] else 1e-6  # a rotation adds numbers up, in an order of its own
    assert len(layers) == len(own)
    for (positions, keys, values, counts), heads in zip(layers, own, strict=True):
        assert [len(p) for p in positions] == [len(k) for k in keys] == [len(c) for c in counts]
        for (k, v), k2, v2 in zip(heads, keys, values, strict=True):
            for a, b in ((k, k2), (v, v2)):
                # a level is decoded in floats, in an order of additions that the format leaves open, and rounded to bfloat16
                np.testing.assert_allclose(
                    b, a, rtol=close if is_exact else 2e-2, atol=close if is_exact else 2e-2 * a.std()
                )


def test_the_reader_is_short_and_shares_nothing_with_steno() -> None:
    text = READER.read_text()
    assert len(text.splitlines()) <= 200
    imported = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {a.name for node in imported if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in imported if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - {"numpy"} <= sys.stdlib_module_names


def test_the_reader_tells_of_damage(tmp_path: Path) -> None:
    data = bytearray((GOLDEN / "q3.steno").read_bytes())
    data[-100] ^= 1
    (tmp_path / "a.steno").write_bytes(data)
    with pytest.raises(ValueError, match="cut or changed"):
        module(READER).read(tmp_path / "a.steno")
