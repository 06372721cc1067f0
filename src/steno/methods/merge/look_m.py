"""LOOK-M: each dropped token is averaged into the kept token with the most similar key.

Source: Wan, Wu, Liu, Huang, Zhu, Jin, Wang, Yuan, 2024, https://arxiv.org/abs/2406.18139, section 3.3; the authors' code.
Differs: the merging only, for any scorer and prompts without images too. Heads may keep different tokens, so the filter of the
    averaged and weighted strategies compares a dropped token with the mean of its own head, where the code takes the mean
    over heads; averaging uses the filtered tokens, where the code mixes them with all.
Cost: 2*Hkv*M*N*D FLOPs for M dropped and N kept tokens, in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.methods.checks import require_choice
from steno.methods.merge.nearest import nearest_keys
from steno.types import LayerKV, Merged, Need, Observation


@final
@dataclass(frozen=True, kw_only=True)
class LookM:
    """Nearest-neighbour merging of keys and values; the keys say into which token.

    Parameters
    ----------
    strategy : str, default "pivotal"
        What is averaged with the kept token: "averaged" the dropped ones, "pivotal" each dropped one's mean with the kept
        one, "weighted" each dropped one times its cosine. "averaged" and "weighted" leave out tokens that are less similar
        than the mean.

    Raises
    ------
    BadArgument
        If `strategy` is none of the three.
    """

    id: ClassVar[str] = "look_m"
    kind: ClassVar[str] = "merge"
    title: ClassVar[str] = "LOOK-M, merging"
    paper: ClassVar[str] = "LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2406.18139"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "The merging only, for any scorer and prompts without images too; averaged and weighted merging leave out what is "
        "less similar than the mean of its own head."
    )
    counts_tokens: ClassVar[bool] = False

    strategy: str = "pivotal"

    def __post_init__(self) -> None:
        require_choice("strategy", self.strategy, ("averaged", "pivotal", "weighted"))

    def merge(self, kv: LayerKV, kept: Tensor, scores: Tensor, obs: Observation) -> Merged:
        """The tokens of `kept` `[Hkv, S]` bool with the others averaged in; `kept` stays as it is."""
        keys, values = kv.keys.clone(), kv.values.clone()
        for head, mine in enumerate(kept):
            if mine.all() or not mine.any():
                continue
            cosine, target = nearest_keys(kv.keys[head, ~mine], kv.keys[head, mine])  # [M]
            for new, old in ((keys, kv.keys), (values, kv.values)):
                survivors = self._averaged(old[head, mine].float(), old[head, ~mine].float(), cosine, target)
                new[head, mine] = survivors.to(new.dtype)
        return Merged(kv=replace(kv, keys=keys, values=values), kept=kept)

    def _averaged(self, survivors: Tensor, dropped: Tensor, cosine: Tensor, target: Tensor) -> Tensor:
        """`survivors` `[N, D]` with `dropped` `[M, D]` averaged into those of `target` `[M]`."""
        if self.strategy == "pivotal":
            dropped = (dropped + survivors[target]) / 2  # [M, D]
        else:
            chosen = cosine >= cosine.mean()
            dropped, cosine, target = dropped[chosen], cosine[chosen], target[chosen]
            if self.strategy == "weighted":
                dropped = dropped * cosine[:, None]
        number = survivors.new_ones(len(survivors), 1).index_add(0, target, torch.ones_like(dropped[:, :1]))  # [N, 1]
        return survivors.index_add(0, target, dropped) / number  # [N, D]
