"""FastKV: after some middle layer only the tokens that matter go on, so the later layers read a shorter prompt.

Source: Jo, Song, Kim, Kim, 2025, https://arxiv.org/abs/2502.01068, sections 4.1 and 4.2; the authors' code.
Differs: the propagation of tokens only; what each layer keeps of the tokens that it computed is left to the scorer, for
    the paper's choice `snapkv(window=8, kernel=7, pool='max')`, for which `fastkv @ 10%` stands, and which pools after the
    mean over the query heads of a KV head, not before. A budget in percent is of the whole prompt in every layer, the
    paper's mode "proportional". Where the prompt is not longer than what goes on, nothing is left out; it has to be read in
    one pass. Only the hidden states of tokens that went on mean anything at the end of the model.
Cost: at one layer 2*H*w*S*D FLOPs and one fp32 temporary of H*w*S; every layer behind it saves what it would have spent
    on the other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from steno.errors import BadArgument
from steno.kernels.attention import attention_weights
from steno.methods.checks import require_choice, require_int, require_real
from steno.types import LayerKV, Need, Observation, Route


@final
@dataclass(frozen=True, kw_only=True)
class FastKV:
    """Tokens that a window at the end of the prompt attends to in one layer; only these reach the layers after it.

    Parameters
    ----------
    layer : int or None, default None
        The layer that chooses, from 0; None: the last of the first half, as the authors do for Llama 3.1 8B (15 of 32).
    share : float, default 0.2 of the prompt
        Share of the tokens that go on, the window included, rounded down.
    window : int, default 8 tokens
        Last tokens of the prompt: their queries choose, and they always go on.
    kernel : int, default 7 tokens
        Width of the pooling that lets neighbours of a chosen token go on; odd.
    pool : str, default "max"
        "avg" or "max".

    Raises
    ------
    BadArgument
        If a value is of another type or out of range, or `kernel` is even; when reading, if the model has no such layer.
    """

    id: ClassVar[str] = "fastkv"
    kind: ClassVar[str] = "propagate"
    title: ClassVar[str] = "FastKV, token-selective propagation"
    paper: ClassVar[str] = (
        "FastKV: Decoupling of Context Reduction and KV Cache Compression for Prefill-Decoding Acceleration"
    )
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2502.01068"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.QUERIES})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "The propagation of tokens only; what each layer keeps is left to the scorer, for the paper's choice "
        "snapkv(window=8, kernel=7, pool='max'), which pools after the mean over the group, not before."
    )
    routes_layers: ClassVar[bool] = True

    layer: int | None = None
    share: float = 0.2
    window: int = 8
    kernel: int = 7
    pool: str = "max"

    def __post_init__(self) -> None:
        if self.layer is not None:
            require_int("layer", self.layer, 0)
        require_real("share", self.share, 0, 1)
        require_int("window", self.window, 1)
        require_int("kernel", self.kernel, 1)
        require_choice("pool", self.pool, ("avg", "max"))
        if self.kernel % 2 == 0:
            raise BadArgument(f"`kernel` must be odd; got kernel={self.kernel}.")

    @property
    def query_window(self) -> int:
        return self.window

    def before(self, hidden: Tensor, image_mask: Tensor | None, *, layer_idx: int, num_layers: int) -> Route | None:
        """No choice of a single layer's own."""
        return None

    def after(self, kv: LayerKV, obs: Observation) -> Tensor | None:
        """At the chosen layer the tokens `[n]` that go on: the window, and the best of the others."""
        if self.layer is not None and self.layer >= obs.num_layers:
            raise BadArgument(f"`layer` must be one of the model's {obs.num_layers}, from 0; got layer={self.layer}.")
        chosen = max(0, obs.num_layers // 2 - 1) if self.layer is None else self.layer
        count = max(int(self.share * kv.num_tokens), self.window)
        if obs.layer_idx != chosen or count >= kv.num_tokens:
            return None
        assert obs.queries is not None, "the host gathers QUERIES"
        queries = obs.queries[:, -self.window :]
        weights = attention_weights(queries, kv.keys, scale=obs.scaling, softcap=obs.softcap)  # [H, w, S]
        mass = weights.sum(1)[:, : -self.window]  # [H, S - w]
        pool = avg_pool1d if self.pool == "avg" else max_pool1d
        pooled: Tensor = pool(mass[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]
        best = pooled.sum(0).argsort(descending=True, stable=True)[
            : count - self.window
        ]  # ties go to the earlier token
        recent = torch.arange(kv.num_tokens - self.window, kv.num_tokens, device=best.device)
        return kv.positions[torch.cat([best.sort().values, recent])]
