"""VideoLLM-MoD: in every other layer a router lets most tokens of a frame pass by on the residual stream.

Source: Wu, Chen, Lin, Wang, Gao, Xu, Xu, Hu, Chen, Shou, 2024, https://arxiv.org/abs/2408.16730, sections 3.2 and 3.3.
Differs: the mechanism at inference only. The router is trained together with the model, which is not done here: a file of it
    must be given, and no result of the paper is reproduced with a model that was not trained this way. No code is
    published; that layers alternate, the first being dense, and that the router's number passes through a sigmoid before it
    scales what a layer adds, are readings of the text. A frame is an unbroken run of image tokens, or `frame_tokens` of it.
Cost: one product with the router per image token and routed layer, which saves what the layer would have spent on the
    others. A prompt in chunks must not be cut within a frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.calibration import load_calibration
from steno.errors import CalibrationError
from steno.methods.checks import require_choice, require_int, require_real, require_text
from steno.types import LayerKV, Need, Observation, Route


@final
@dataclass(frozen=True, kw_only=True)
class VideoLLMMoD:
    """Mixture of depths for image tokens; text passes every layer.

    Parameters
    ----------
    router : str or None, default None
        Safetensors file with the tensor `router`, `[L, hidden]`, a row per layer, trained with the model; needed to read.
    share : float, default 0.2 of a frame
        Share of a frame's tokens that a routed layer computes, rounded up.
    every : int, default 2 layers
        The last of every so many layers is routed, the others are dense; 1: all are.
    frame_tokens : int or None, default None
        Tokens of a frame, where frames follow each other without text between; None: a run of image tokens is a frame.
    gate : str, default "sigmoid"
        What the router's number becomes before it scales what the layer adds to an image token: "sigmoid", or "none".

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    CalibrationError
        When reading, if there is no router, or it is not that of this model.
    """

    id: ClassVar[str] = "videollm_mod"
    kind: ClassVar[str] = "propagate"
    title: ClassVar[str] = "VideoLLM-MoD (reconstruction)"
    paper: ClassVar[str] = "VideoLLM-MoD: Efficient Video-Language Streaming with Mixture-of-Depths Vision Computation"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2408.16730"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.IMAGE_MASK})
    trained: ClassVar[bool] = True
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "The mechanism at inference only, with a router from a file: training it with the model is not done here, and no "
        "result of the paper is reproduced. Which layers are routed and the gate are readings of the text."
    )
    routes_layers: ClassVar[bool] = True

    router: str | None = None
    share: float = 0.2
    every: int = 2
    frame_tokens: int | None = None
    gate: str = "sigmoid"

    def __post_init__(self) -> None:
        if self.router is not None:
            require_text("router", self.router)
        require_real("share", self.share, 0, 1)
        require_int("every", self.every, 1)
        if self.frame_tokens is not None:
            require_int("frame_tokens", self.frame_tokens, 1)
        require_choice("gate", self.gate, ("sigmoid", "none"))

    @property
    def query_window(self) -> int:
        return 0

    def before(self, hidden: Tensor, image_mask: Tensor | None, *, layer_idx: int, num_layers: int) -> Route | None:
        """In routed layers all text, and of each frame the tokens that the router ranks highest."""
        assert image_mask is not None, "the host gathers IMAGE_MASK"
        weights = self._router(num_layers, hidden.shape[1])
        if layer_idx % self.every != self.every - 1 or not image_mask.any():
            return None
        ranks = hidden.float() @ weights[layer_idx].to(hidden.device)  # [T]
        chosen = ~image_mask
        for frame in self._frames(image_mask):
            best = ranks[frame].argsort(descending=True, stable=True)  # ties go to the earlier token
            chosen[frame[best[: math.ceil(self.share * len(frame))]]] = True
        index = chosen.nonzero()[:, 0]
        if self.gate == "none":
            return Route(index=index) if len(index) < len(hidden) else None
        return Route(index=index, gates=torch.where(image_mask, ranks.sigmoid(), 1.0)[index])

    def after(self, kv: LayerKV, obs: Observation) -> Tensor | None:
        """No choice for the later layers."""
        return None

    def _router(self, num_layers: int, hidden: int) -> Tensor:
        if self.router is None:
            raise CalibrationError(
                "videollm_mod needs a router that was trained with the model, which steno does not train: name its file, "
                "videollm_mod(router='FILE'), a safetensors file with the tensor `router` of [layers, hidden]."
            )
        router = load_calibration(self.router, ("router",))["router"]
        if list(router.shape) != [num_layers, hidden]:
            raise CalibrationError(
                f"the router must be that of this model, [{num_layers}, {hidden}]; got {list(router.shape)} in {self.router}."
            )
        return router

    def _frames(self, image_mask: Tensor) -> list[Tensor]:
        """The positions of each frame."""
        positions = image_mask.nonzero()[:, 0]
        ends = (positions.diff() > 1).nonzero()[:, 0] + 1
        runs = positions.tensor_split(ends.cpu())
        return [frame for run in runs for frame in run.split(self.frame_tokens or len(run))]
