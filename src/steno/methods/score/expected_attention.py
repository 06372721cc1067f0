"""Expected Attention: future queries are roughly Gaussian before rotation, so their mean attention has a closed form.

Source: Devoto, Jeblick, Jegou, 2025, https://arxiv.org/abs/2510.00636; the authors' code in NVIDIA kvpress.
Differs: `n_sink` first tokens are told by their true positions, and the scale of the logits is the model's own
    instead of 1/sqrt(D). As in the authors' code the rotation is averaged over the future before it is applied to
    the covariance.
Cost: 2*H*S*D*D FLOPs for the quadratic form; one fp32 temporary of G*S*D at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.calibration import load_calibration
from steno.errors import CalibrationError
from steno.methods.checks import require_bool, require_int, require_real, require_text
from steno.types import LayerKV, Need, Observation, Rope

STATISTICS = ("query_mean", "query_cov")
"""Tensors of a statistics file: `[L, H, D]` and `[L, H, D, D]`, of the layers that hold keys under a recipe."""


@final
@dataclass(frozen=True, kw_only=True)
class ExpectedAttention:
    """Attention expected from the queries to come, times the norm of the value.

    Parameters
    ----------
    future_positions : int, default 512 tokens
        How far ahead the rotation is averaged.
    n_sink : int, default 4 tokens
        First tokens that are always kept, and left out of the query statistics.
    covariance : bool, default True
        Whether the spread of the queries counts, not only their mean.
    value_norm : bool, default True
        Whether the norm of the value counts.
    eps : float, default 0.0
        Added to the attention before the norm of the value multiplies it.
    statistics : str or None, default None
        A file of `steno calibrate expected_attention` with the mean and covariance of the queries. None: that of this model
        where there is one, else those of the prompt.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    CalibrationError
        When scoring, if the file of `statistics` cannot be used.
    """

    id: ClassVar[str] = "expected_attention"
    kind: ClassVar[str] = "score"
    title: ClassVar[str] = "Expected Attention"
    paper: ClassVar[str] = (
        "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution"
    )
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2510.00636"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.QUERY_STATISTICS})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Sinks are told by their true positions, and the scale of the logits is the model's own instead of 1/sqrt(D)."
    )
    evicts_while_decoding: ClassVar[bool] = False

    future_positions: int = 512
    n_sink: int = 4
    covariance: bool = True
    value_norm: bool = True
    eps: float = 0.0
    statistics: str | None = None

    def __post_init__(self) -> None:
        require_int("future_positions", self.future_positions, 1, 2**20)
        require_int("n_sink", self.n_sink, 0)
        require_bool("covariance", self.covariance)
        require_bool("value_norm", self.value_norm)
        require_real("eps", self.eps, 0, 1e6)
        if self.statistics is not None:
            require_text("statistics", self.statistics)

    @property
    def query_window(self) -> int:
        return 0

    @property
    def query_statistics_skip(self) -> int:
        return self.n_sink

    @property
    def min_tokens(self) -> int:
        return self.n_sink

    def score(self, kv: LayerKV, obs: Observation) -> Tensor:
        """Scores `[Hkv, S]` fp32, sinks +inf."""
        scores = torch.full((kv.num_kv_heads, kv.num_tokens), torch.inf, device=kv.keys.device)  # [Hkv, S]
        first = int((kv.positions < self.n_sink).sum())
        if first < kv.num_tokens:
            mean, cov = self._future_queries(kv, obs)
            for head, keys in enumerate(kv.keys[:, first:].float()):
                z = _log_expected_weight(keys, mean[head], cov[head], obs.scaling)  # [G, S - first]
                scores[head, first:] = z.softmax(-1).mean(0) + self.eps
            if self.value_norm:
                scores[:, first:] *= kv.values[:, first:].float().norm(dim=-1)
        return scores

    def _statistics(self, obs: Observation) -> tuple[Tensor, Tensor]:
        """Mean `[H, D]` and covariance `[H, D, D]` fp32 of the queries before rotation."""
        assert obs.query_mean is not None, "the host gathers QUERY_STATISTICS"
        assert obs.query_cov is not None, "the host gathers QUERY_STATISTICS"
        if self.statistics is not None:
            return _of_layer(load_calibration(self.statistics, STATISTICS), obs, obs.query_mean)
        return obs.query_mean.float(), obs.query_cov.float()

    def _future_queries(self, kv: LayerKV, obs: Observation) -> tuple[Tensor, Tensor]:
        """Mean `[Hkv, G, D]` and covariance `[Hkv, G, D, D]` of the queries to come, rotated."""
        mean, cov = self._statistics(obs)
        cov = cov * self.covariance
        if obs.rope is not None:
            start = int(kv.positions[-1]) + 1
            cos, sin = _mean_rotation(obs.rope, start, self.future_positions, mean.device)
            mean = _rotate(mean, cos, sin)
            cov = _rotate(_rotate(cov, cos, sin).mT, cos, sin)  # R cov R^T, cov is symmetric
        heads, dim = kv.num_kv_heads, kv.head_dim
        return mean.reshape(heads, -1, dim), cov.reshape(heads, -1, dim, dim)


def _of_layer(tensors: Mapping[str, Tensor], obs: Observation, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[H, D]` and covariance `[H, D, D]` of one layer from those of all, if they fit the model."""
    mean, cov = tensors["query_mean"], tensors["query_cov"]
    heads, dim = like.shape
    wanted = [obs.num_layers, heads, dim]
    if list(mean.shape) != wanted or list(cov.shape) != [*wanted, dim]:
        raise CalibrationError(
            f"the query statistics must be those of this model, {wanted}; got {list(mean.shape)}: calibrate on this model."
        )
    return mean[obs.layer_idx].to(like.device), cov[obs.layer_idx].to(like.device)


def _mean_rotation(rope: Rope, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin `[R]` averaged over the positions start .. start + count - 1."""
    cos, sin = rope.cos_sin(torch.arange(start, start + count, device=device))  # [F, R]
    return cos.mean(0), sin.mean(0)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R of the last dimension of `x`; the rest passes."""
    rotated, rest = x[..., : cos.shape[0]], x[..., cos.shape[0] :]
    left, right = rotated.chunk(2, dim=-1)
    return torch.cat([rotated * cos + torch.cat([-right, left], dim=-1) * sin, rest], dim=-1)


def _log_expected_weight(keys: Tensor, mean: Tensor, cov: Tensor, scaling: float) -> Tensor:
    """log E[exp(scaling * q.k)] `[G, N]` for q ~ N(mean `[G, D]`, cov `[G, D, D]`) and keys `[N, D]`."""
    spread = ((keys @ cov) * keys).sum(-1)  # [G, N]
    return mean @ keys.T * scaling + spread * (scaling**2 / 2)
