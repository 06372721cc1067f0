"""The row: everything that is known of one recipe on one task, and enough to measure it again. One JSON line each."""

from __future__ import annotations

import json
import os
import types
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, final

from steno.errors import BadArgument

ROWS_FILE = "rows.jsonl"
PEER = "peer:"
"""How the recipe of a row begins that was measured with another project's code."""


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """What a recipe costs and loses on the instances of one task.

    Identity: `model` as it was asked for, with its hash; `recipe` (a peer's rows say `peer:NAME:METHOD`); `protocol`, whether
    compression saw the question: `unseen`, `seen`, or `none` where there is no question; `context_tokens`, everything
    together where the task has the length that was asked for (`sized`), else the longest prompt; `instances`, a hash of what
    was generated, so that two rows with the same one can be paired instance by instance.

    Quality: `score` 0 to 1 with its 95 % interval and how it was made; `score_full`, the full cache on the same instances;
    `difference` = score - score_full, paired. `kl` (nats per token) and `top1_agreement` against the full cache, each token
    of the full cache's answer (or of the continuing text) forced; of the full cache itself 0 and 1 by definition.

    Cost: bytes are means over the instances, `kv_bytes_peak` the largest; `kv_bytes_end` is held after the last new token;
    `bits_per_value`, bits held per number of the full cache. Seconds are medians over instances, `*_quartiles` their spread;
    `compress_s` is what scoring and packing took after the prefill, 0 where the recipe does it within.
    """

    model: str
    model_hash: str
    dtype: str
    device: str
    recipe: str
    task: str
    protocol: str
    context_tokens: int
    sized: bool
    samples: int
    seed: int
    instances: str
    score: float
    score_low: float
    score_high: float
    score_interval: str
    score_full: float
    difference: float
    difference_low: float
    difference_high: float
    difference_interval: str
    kl: float | None
    kl_low: float | None
    kl_high: float | None
    top1_agreement: float | None
    perplexity: float | None
    prompt_tokens: float
    new_tokens: float
    refused: int
    frees_memory: bool
    kv_bytes_full: int
    kv_bytes: int
    kv_bytes_peak: int
    kv_bytes_end: int
    bits_per_value: float
    prefill_s: float
    prefill_s_quartiles: list[float]
    compress_s: float
    compress_s_quartiles: list[float]
    ttft_s: float | None
    ttft_s_quartiles: list[float] | None
    decode_ms_per_token: float | None
    decode_ms_per_token_quartiles: list[float] | None
    scores: list[float]
    scores_full: list[float]
    kls: list[float] | None
    depths: list[float] | None
    wall_s: float
    measured_at: str
    versions: dict[str, str]
    git_sha: str | None
    host: str
    threads: int

    @property
    def cell(self) -> tuple[str, str, str, int]:
        """What is measured: recipe, task, protocol, context."""
        return self.recipe, self.task, self.protocol, self.context_tokens

    @property
    def experiment(self) -> tuple[str, str, str, int]:
        """What all rows of a folder share: model hash, dtype, device, seed."""
        return self.model_hash, self.dtype, self.device, self.seed


def append_row(path: Path, row: Row) -> None:
    """Appends one line with one write, and waits until it is on the disk."""
    line = json.dumps(asdict(row), allow_nan=False) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())
        os.fsync(file.fileno())


def drop_torn_line(path: Path) -> bool:
    """Cuts off a last line without its end, left by a machine that went down while it was written; True if there was one."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end == len(data):
        return False
    with path.open("r+b") as file:
        file.truncate(end)
    return True


def read_rows(path: Path) -> list[Row]:
    """The rows of a file. Raises BadArgument with file and line if one is broken."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadArgument(f"no such file: {path}") from None
    except IsADirectoryError:
        raise BadArgument(f"{path} is a folder; name a file of rows, such as {path / ROWS_FILE}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadArgument(f"cannot read {path}: {error}") from None
    return [_parse(path, n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _parse(path: Path, number: int, line: str) -> Row:
    where = f"{path}, line {number}"
    try:
        values = json.loads(line)
    except ValueError as error:
        raise BadArgument(f"{where}: not JSON ({error}).") from None
    if not isinstance(values, dict):
        raise BadArgument(f"{where}: a row must be an object; got {type(values).__name__}.")
    hints = typing.get_type_hints(Row)
    missing, unknown = sorted(hints.keys() - values.keys()), sorted(values.keys() - hints.keys())
    if missing or unknown:
        raise BadArgument(f"{where}: not a row of this version: missing {_names(missing)}, unknown {_names(unknown)}.")
    for field in fields(Row):
        if not _fits(values[field.name], hints[field.name]):
            raise BadArgument(f"{where}: `{field.name}` must be {field.type}; got {values[field.name]!r:.60}.")
    return Row(**values)


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is what an annotation of Row says; whole numbers count as floats."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, inner[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
