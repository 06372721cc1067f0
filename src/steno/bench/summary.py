"""From measurements to a row: means, medians and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any, final

import torch

from steno.bench.machine import Machine
from steno.bench.measure import Measurement
from steno.bench.plan import FULL, Group
from steno.bench.rows import PEER, Row
from steno.bench.stats import bootstrap, difference_interval, mean_interval, quartiles
from steno.errors import BadArgument
from steno.methods import METHODS
from steno.recipe import parse_recipe
from steno.session import LanguageModel


@final
@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is the same in all rows of a run: the model, as it was asked for and as it was loaded, the seed, the machine."""

    lm: LanguageModel
    model: str
    seed: int
    machine: Machine

    @classmethod
    def of(cls, lm: LanguageModel, model: str, seed: int) -> Subject:
        return cls(lm=lm, model=model, seed=seed, machine=Machine.here(str(lm.model.device)))

    @property
    def experiment(self) -> tuple[str, str, str, int]:
        """As `Row.experiment`."""
        lm = self.lm
        return lm.loaded.model_hash, str(lm.model.dtype).removeprefix("torch."), str(lm.model.device), self.seed


def summarize(
    subject: Subject,
    group: Group,
    recipe: str,
    measured: Sequence[Measurement],
    scores_full: list[float],
    wall_s: float,
) -> Row:
    """The row of a recipe from its measurements. Raises BadArgument if it refused every instance."""
    if not any(m.reports for m in measured):
        raise BadArgument(f"{recipe} refuses every prompt of {group.task.id}: {measured[0].refused}")
    model_hash, dtype, device, seed = subject.experiment
    return Row(
        model=subject.model,
        model_hash=model_hash,
        dtype=dtype,
        device=device,
        recipe=recipe,
        task=group.task.id,
        protocol=group.protocol,
        context_tokens=group.row_context_tokens,
        sized=group.task.takes_context,
        samples=len(measured),
        seed=seed,
        instances=group.digest,
        **_answers(measured, scores_full, is_full=recipe == FULL),
        **_cost(measured, subject.lm.model.dtype.itemsize, None if recipe.startswith(PEER) else frees_memory(recipe)),
        wall_s=wall_s,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        **vars(subject.machine),
    )


def _answers(measured: Sequence[Measurement], scores_full: list[float], *, is_full: bool) -> dict[str, Any]:
    """What the answers are worth: scores, the difference to the full cache's, and drift."""
    scores = [m.score for m in measured]
    score, difference = mean_interval(scores), difference_interval(scores, scores_full)
    kls = [sum(m.kls) / len(m.kls) for m in measured if m.kls]
    kl = bootstrap(kls) if kls else None
    agreed = list(chain.from_iterable(m.agreed for m in measured))
    nats = list(chain.from_iterable(m.nats for m in measured))
    return {
        "score": score.value,
        "score_low": score.low,
        "score_high": score.high,
        "score_interval": f"{score.method} 95 %",
        "score_full": _mean(scores_full),
        "difference": 0.0 if is_full else difference.value,
        "difference_low": 0.0 if is_full else difference.low,
        "difference_high": 0.0 if is_full else difference.high,
        "difference_interval": "itself" if is_full else f"{difference.method} 95 %, paired",
        "kl": 0.0 if is_full else kl.value if kl else None,
        "kl_low": 0.0 if is_full else kl.low if kl else None,
        "kl_high": 0.0 if is_full else kl.high if kl else None,
        "top1_agreement": 1.0 if is_full else _mean(agreed) if agreed else None,
        "perplexity": float(torch.tensor(nats, dtype=torch.float64).mean().exp()) if nats else None,
        "scores": scores,
        "scores_full": scores_full,
        "kls": None if is_full or not kls else kls,
        "depths": [m.depth for m in measured if m.depth is not None] or None,
    }


def _cost(measured: Sequence[Measurement], value_bytes: int, frees: bool | None) -> dict[str, Any]:
    """Tokens, bytes and seconds. value_bytes: of one number of a dense cache; frees: None: seen from the bytes held."""
    reports = [report for m in measured for report in m.reports]
    prefill, compress = (quartiles([getattr(r, name) for r in reports]) for name in ("prefill_s", "compress_s"))
    ttft = _spread([t for m in measured for t in m.ttft_s])
    decode = _spread([1000 * t for m in measured for t in m.step_s])
    full, held = _mean([r.kv_bytes_full for r in reports]), _mean([r.kv_bytes for r in reports])
    return {
        "prompt_tokens": _mean([r.prompt_tokens for r in reports]),
        "new_tokens": _mean([m.new_tokens for m in measured if not m.refused]),
        "refused": sum(bool(m.refused) for m in measured),
        "frees_memory": held < full if frees is None else frees,
        "kv_bytes_full": round(full),
        "kv_bytes": round(held),
        "kv_bytes_peak": max(max(m.kv_bytes_peak for m in measured), max(r.kv_bytes_peak for r in reports)),
        "kv_bytes_end": round(_mean([m.kv_bytes_end for m in measured if not m.refused])),
        "bits_per_value": 8 * held / (full / value_bytes),
        "prefill_s": prefill[1],
        "prefill_s_quartiles": [prefill[0], prefill[2]],
        "compress_s": compress[1],
        "compress_s_quartiles": [compress[0], compress[2]],
        "ttft_s": ttft[1] if ttft else None,
        "ttft_s_quartiles": [ttft[0], ttft[2]] if ttft else None,
        "decode_ms_per_token": decode[1] if decode else None,
        "decode_ms_per_token_quartiles": [decode[0], decode[2]] if decode else None,
    }


def frees_memory(recipe: str) -> bool:
    """Whether a recipe of ours holds less than the full cache, by what its methods declare."""
    return any(METHODS[stage.id].frees_memory for stage in parse_recipe(recipe).stages)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float]) -> tuple[float, float, float] | None:
    return quartiles(values) if values else None
