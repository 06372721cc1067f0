"""Weights for decoding: linear layers that read 16, 8 or 4 bits per weight through the kernels of torch, on x86 CPUs.

A decode step reads every weight once, so with a small KV cache the weights are most of what is left to read. Embeddings,
norms and the experts of a mixture stay as they are; an output head that shares its matrix with the embedding gets one
of its own, since the embedding is still looked up.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import final

import torch
from torch import Tensor, nn

from steno.errors import BadArgument, ModelError, nearest

GROUP = 32
"""Neighbouring input channels that share a scale and a zero point in `Int4Linear`."""

FEW_TOKENS = 32
"""Up to so many `Int8WeightLinear` multiplies codes as they are; decoding them pays where there are more."""


@final
class Fp16Linear(nn.Module):
    """Weights as float16, computed in float32: what is lost is the rounding of the weights, 2^-11 of each.

    Weights below 6e-8 become 0, and there must be none beyond 65504.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        if weight.abs().max() > torch.finfo(torch.float16).max:
            raise ModelError("weights='fp16' cannot hold a weight beyond 65504, and this model has one; leave it out.")
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in the dtype of x."""
        return _with_bias(torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed), self.bias, x)


@final
class Bf16Linear(nn.Module):
    """Weights as bfloat16, laid out once as oneDNN reads them instead of anew in every call.

    Of a model in bfloat16 nothing is lost: results are those of `nn.Linear` to the bit.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().bfloat16())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in the dtype of x."""
        bias = self.bias if x.dtype == torch.bfloat16 else None  # else it is added in more bits
        out = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.packed, bias, "none", [], "")
        return out if bias is not None else _with_bias(out, self.bias, x)


@final
class Int8Linear(nn.Module):
    """Weights as int8 with a scale per output channel; activations as uint8 with a scale and zero point per token.

    For CPUs with VNNI: elsewhere FBGEMM can overflow unless one of both has 7 bits.
    The kernel itself has one range for all tokens of a call, which costs far more than 8 bits should: one outlier token
    coarsens all others. So several tokens are each brought to the range [-1, 1] before, and back after.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1).double() / 127).clamp_min(1e-12)
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with _fbgemm():
            codes = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(codes, None)
        self.row_sums = codes.dequantize().sum(1)  # [out]
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in the dtype of x."""
        values = x.float()
        if x.numel() == x.shape[-1]:
            return _with_bias(self._product(values), self.bias, x)
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        center, half = (low + high).mul_(0.5), (high - low).mul_(0.5).clamp_min_(1e-12)  # [..., 1]
        out = self._product((values - center).div_(half))
        return _with_bias(out.mul_(half).addcmul_(center, self.row_sums), self.bias, x)

    def _product(self, values: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic(values, self.packed, False)
        return out


@final
class Int8WeightLinear(nn.Module):
    """Weights as int8 with a scale per output channel, for CPUs without VNNI: activations stay floating-point numbers.

    Of few tokens they are bfloat16, and codes are multiplied as they are; for many tokens the weights become float32 for the
    time of the call.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.scales = (weight.abs().amax(1) / 127).clamp_min(1e-12)  # [out]
        codes = (weight / self.scales[:, None]).round_().to(torch.int8)
        # [out, in and zeros]: the kernel reads a register at a time and knows no rest
        self.padding = -weight.shape[1] % 32
        self.codes = nn.functional.pad(codes, (0, self.padding))
        self.ones = torch.ones_like(self.scales, dtype=torch.bfloat16)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in the dtype of x."""
        flat = nn.functional.pad(x.reshape(-1, x.shape[-1]), (0, self.padding))
        if len(flat) <= FEW_TOKENS:
            # scales are applied in float32, as the kernel takes them in the dtype of the activations
            out = torch.ops.aten._weight_int8pack_mm(flat.bfloat16(), self.codes, self.ones).float().mul_(self.scales)
        else:
            out = nn.functional.linear(flat.float(), self.codes.float().mul_(self.scales[:, None]))
        return _with_bias(out.view(*x.shape[:-1], -1), self.bias, x)


@final
class Int4Linear(nn.Module):
    """Weights as 4 bits with a bfloat16 scale and zero point per group of 32 input channels; activations in bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        grouped = weight.unflatten(1, (-1, GROUP))  # [out, in / 32, 32]
        low, high = grouped.amin(-1), grouped.amax(-1)
        scales = ((high - low) / 15).clamp_min(1e-9)
        codes = ((grouped - low[..., None]) / scales[..., None]).round().to(torch.int32).flatten(1)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        params = torch.stack([scales, low + 8 * scales], dim=-1)  # the kernel computes (code - 8) * scale + zero
        self.params = params.transpose(0, 1).contiguous().bfloat16()  # [in / 32, out, 2]
        self.bias = linear.bias

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        """Whether the kernel takes a matrix of this shape."""
        return linear.in_features % GROUP == 0 and linear.out_features % 16 == 0

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in the dtype of x."""
        flat = x.reshape(-1, x.shape[-1]).bfloat16()
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, GROUP, self.params)
        return _with_bias(out.view(*x.shape[:-1], -1), self.bias, x)


def _with_bias(out: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    out = out.to(x.dtype)
    return out if bias is None else out.add_(bias)


FORMATS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {"bf16": Bf16Linear, "fp16": Fp16Linear, "int8": Int8Linear, "int4": Int4Linear}
)


def check_weights(weights: str | None, device: torch.device) -> None:
    """Raise `BadArgument` unless `weights` is None or the name of a format that `device` can run."""
    if weights is None:
        return
    if weights not in FORMATS:
        raise BadArgument(f"`weights` must name a format; got weights={weights!r}; {nearest(weights, FORMATS)}")
    if device.type != "cpu":
        raise BadArgument(f"weights={weights!r} runs on a CPU only; got device={device.type!r}; leave one of them out.")
    if weights == "bf16" and not (torch.backends.mkldnn.is_available() and cpu_has_bfloat16()):
        raise BadArgument("weights='bf16' needs oneDNN in torch and a CPU that multiplies bfloat16; take 'fp16' here.")
    if weights != "bf16" and "fbgemm" not in torch.backends.quantized.supported_engines:
        raise BadArgument(f"weights={weights!r} needs the FBGEMM kernels of torch, which this build (not x86?) lacks.")


def shrink_weights(model: nn.Module, weights: str) -> None:
    """Replace the linear layers of `model` by those of a format, one by one. Mutates the model; for inference only.

    With `int4` a layer whose shape the kernel does not take, and the output head, become `int8`: the head decides the
    token, and 4 bits there cost more than those of all other layers together.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    for parent, name, linear in list(_linears(model)):
        kind = FORMATS[weights]
        if kind is Int4Linear and (linear is head or not Int4Linear.fits(linear)):
            kind = Int8Linear
        if kind is Int8Linear and not has_vnni():
            kind = Int8WeightLinear
        setattr(parent, name, kind(linear))


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                yield parent, name, child


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"))


def has_vnni() -> bool:
    """Whether products of 8-bit numbers are added up in 32 bits at once."""
    return bool(torch.cpu.get_capabilities().get("avx512_vnni", False))


@contextmanager
def _fbgemm() -> Iterator[None]:
    """Within it torch packs for FBGEMM, whatever its engine is otherwise."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            # torch warns that its quantized tensors will go one day; constraints.txt pins a version that has them
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
            yield
    finally:
        torch.backends.quantized.engine = before
