"""KeyDiff: keys that point away from the mean direction of their head are the ones that attention picks out.

Source: Park, Jones, Morse, Goel, Lee, Lott, 2025, https://arxiv.org/abs/2504.15364.
Differs: written from the paper, not from the authors' code (the formula agrees with NVIDIA kvpress); the paper
    evicts after each block of a long prompt and while decoding, this after each chunk that is read, or once at the
    prompt's end, and protects no recent window.
Cost: 3*Hkv*S*D FLOPs; one fp32 copy of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import normalize

from steno.types import LayerKV, Need, Observation


@final
@dataclass(frozen=True, kw_only=True)
class KeyDiff:
    """Negative cosine similarity of a key with the mean of the normalised keys of its head; no parameters."""

    id: ClassVar[str] = "keydiff"
    kind: ClassVar[str] = "score"
    title: ClassVar[str] = "KeyDiff"
    paper: ClassVar[str] = (
        "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference "
        "in Resource-Constrained Environments"
    )
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2504.15364"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Written from the paper; it evicts after each block of the prompt and while decoding, "
        "this after each chunk that is read, or once at the prompt's end, and protects no recent window."
    )
    evicts_while_decoding: ClassVar[bool] = False

    @property
    def query_window(self) -> int:
        return 0

    @property
    def query_statistics_skip(self) -> int:
        return 0

    @property
    def min_tokens(self) -> int:
        return 0

    def token_state(self, kv: LayerKV, obs: Observation) -> Tensor:
        """Zeros: the method looks at the keys that are held."""
        return torch.zeros(kv.num_kv_heads, kv.num_tokens, device=kv.keys.device)  # [Hkv, T]

    def retention(self, keys: Tensor, state: Tensor, positions: Tensor, *, budget_tokens: int, is_last: bool) -> Tensor:
        """The score among the keys that are held."""
        return self._difference(keys)

    def score(self, kv: LayerKV, obs: Observation) -> Tensor:
        """Scores `[Hkv, S]` fp32 in [-1, 1]."""
        return self._difference(kv.keys)

    def _difference(self, keys: Tensor) -> Tensor:
        directions = normalize(keys.float(), dim=-1)  # [Hkv, S, D]
        anchor = normalize(directions.mean(1), dim=-1)  # [Hkv, D]
        return -(directions @ anchor[:, :, None])[..., 0]  # [Hkv, S]
