"""Double Sparsity: a few channels of each key tell well enough which tokens matter; read only those tokens.

Source: Yang, Sheng, Gonzalez, Stoica, Zheng, 2024, https://arxiv.org/abs/2408.07092; the authors' code
    andy-yang-1/DoubleSparse (attention, offline calibration).
Differs: tokens are chosen per KV head by the largest approximate logit of its query heads, with one list of channels per KV
    head, the paper chooses per query head; without a calibration file the channels are those in which the keys of the
    prompt are largest (the authors' option `k`); labels keep the dtype of the model, the paper can quantize them; calibration
    averages over all blocks, where the released code keeps the last one. The newest tokens, up to the length of a page or of
    the quantizer's residual, are always read beside. Chosen tokens are copied out of their pages before attention.
Cost: 2*H*S*r FLOPs per step with r channels; r numbers per token and KV head held beside the tokens. Saves reads, not
    memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.cache.access import AccessStep, Choice
from steno.cache.ragged import best
from steno.calibration import load_calibration
from steno.errors import CalibrationError
from steno.methods.checks import require_int, require_text
from steno.types import IndexItems, LayerKV, Need, Observation

IMPORTANCE = "channel_importance"
"""The tensor of a calibration file, `[L, Hkv, D]`: the mean of |q k| in each channel."""


@final
@dataclass(frozen=True, kw_only=True)
class DoubleSparsity:
    """Read the tokens with the largest logits in a few channels.

    Parameters
    ----------
    tokens : int, default 1024 tokens
        How many tokens each KV head reads per step, beside the newest.
    channels : int, default 8 channels
        How many channels of a key its label has; at most the head dimension.
    dense_layers : int, default 2 layers
        First layers that read everything.
    statistics : str or None, default None
        A file of `steno calibrate double_sparsity` with `channel_importance` `[L, Hkv, D]`. None: that of this model where
        there is one, else the channels are those of the prompt's keys.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    CalibrationError
        When the prompt is complete, if the file of `statistics` cannot be used.
    """

    id: ClassVar[str] = "double_sparsity"
    kind: ClassVar[str] = "access"
    title: ClassVar[str] = "Double Sparsity"
    paper: ClassVar[str] = "Post-Training Sparse Attention with Double Sparsity"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2408.07092"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = False
    differs: ClassVar[str] = (
        "Tokens are chosen per KV head, with one list of channels per KV head, the paper chooses per query head; without a "
        "calibration file the channels come from the keys of the prompt; labels are not quantized; the newest tokens are "
        "always read beside."
    )
    reads_all: ClassVar[bool] = False
    summarizes: ClassVar[bool] = True
    offload: ClassVar[bool] = False

    tokens: int = 1024
    channels: int = 8
    dense_layers: int = 2
    statistics: str | None = None

    def __post_init__(self) -> None:
        require_int("tokens", self.tokens, 1)
        require_int("channels", self.channels, 1, 4096)
        require_int("dense_layers", self.dense_layers, 0)
        if self.statistics is not None:
            require_text("statistics", self.statistics)

    def reads_layer(self, layer_idx: int, num_layers: int) -> bool:
        return layer_idx < self.dense_layers

    def fix(self, keys: Sequence[Tensor], layer_idx: int, num_layers: int) -> Tensor:
        """The most important channels of each head, `[Hkv, r]` int64, ascending."""
        importance = torch.stack([k.float().abs().sum(0) for k in keys])  # [Hkv, D]
        if self.statistics is not None:
            importance = _of_layer(load_calibration(self.statistics, (IMPORTANCE,)), layer_idx, num_layers, importance)
        order = importance.argsort(dim=1, descending=True, stable=True)  # [Hkv, D]
        return order[:, : self.channels].sort(dim=1).values

    def summarize(self, keys: Tensor, fixed: Tensor | None, sentences: Tensor | None) -> IndexItems:
        """The label of each token, `[n, r]`."""
        assert fixed is not None, "the channels are fixed when the prompt is complete"
        return IndexItems(vectors=keys[:, fixed])

    def choose(self, step: AccessStep) -> Choice:
        """The tokens with the largest products of labels."""
        chosen = step.fixed[:, None].expand(-1, step.queries.shape[1], -1)  # [R, G, r]
        scores = step.rank(step.queries.gather(2, chosen)).amax(1)  # [R, n]
        return Choice(tokens=best(scores, step.head_tokens.clamp(max=self.tokens)))

    def index_bytes(self, head_dim: int, number_bytes: int) -> tuple[int, int]:
        width = min(self.channels, head_dim)
        return width * number_bytes, width * 8


def channel_importance(kv: LayerKV, observation: Observation) -> Tensor:
    """The mean of |q k| over the tokens of a text, each with its own key, in each channel: `[Hkv, D]` fp32, heads of a group
    averaged. The observation has the queries of all tokens."""
    assert observation.queries is not None, "calibration gathers QUERIES"
    grouped = observation.queries.float().unflatten(0, (kv.num_kv_heads, -1))  # [Hkv, G, S, D]
    return (grouped * kv.keys.float()[:, None]).abs().mean(dim=(1, 2))


def _of_layer(tensors: Mapping[str, Tensor], layer_idx: int, num_layers: int, like: Tensor) -> Tensor:
    """The importance `[Hkv, D]` in one layer from that in all, if it fits the model."""
    importance = tensors[IMPORTANCE]
    wanted = [num_layers, *like.shape]
    if list(importance.shape) != wanted:
        raise CalibrationError(
            f"the channel importance must be that of this model, {wanted}; got {list(importance.shape)}: use one of it."
        )
    return importance[layer_idx].to(like.device)
