"""The statistics of `expected_attention(statistics=…)`: mean and covariance of the model's queries on a text."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steno.errors import PromptError
from steno.learn.gather import look
from steno.learn.options import Options
from steno.methods import ExpectedAttention
from steno.session import LanguageModel
from steno.types import Need

MIN_TOKENS = 64


def learn(lm: LanguageModel, text: str, options: Options) -> Mapping[str, Tensor]:
    """`query_mean` `[L, H, D]` and `query_cov` `[L, H, D, D]` fp32, first tokens left out as the method does."""
    tokens = lm.tokenize(text)[: lm.loaded.max_positions]
    if len(tokens) < MIN_TOKENS:
        raise PromptError(f"calibration needs at least {MIN_TOKENS} tokens of text; got {len(tokens)}.")
    options.report("reading", 0, 1)
    seen = look(lm, tokens, Need.QUERY_STATISTICS, query_statistics_skip=ExpectedAttention().query_statistics_skip)
    options.report("reading", 1, 1)
    means = [o.query_mean for _, o in seen if o.query_mean is not None]
    covariances = [o.query_cov for _, o in seen if o.query_cov is not None]
    return {"query_mean": torch.stack(means), "query_cov": torch.stack(covariances)}
