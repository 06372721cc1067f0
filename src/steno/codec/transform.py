"""Keys or values of one layer as small whole numbers: a basis fitted to them, one step for all of it, few tokens finer.

Source: Staniszewski and Łańcucki, KV Cache Transform Coding for Compact Storage in LLM Inference, 2025,
https://arxiv.org/abs/2511.01815: keys before rotation, PCA, bits by the variance of a component, the first and the newest
tokens apart. Liu et al., CacheGen, 2023, https://arxiv.org/abs/2310.07240, section 5.2: layers differ in how fine they must be.
Differs: the basis spans the heads of one layer, is fitted to the context itself and lies in the file in 8 bits, since one over
all layers would cost more than a context; there is no plan of bits per component: with one step for all, entropy coding gives
each the bits that reverse water-filling would; numbers outside 8 bits double the step of their component.
Cost: for N tokens of C channels 4 N C² FLOPs to encode, 2 N C² to decode, C <= 256; an eigenproblem of C.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from steno.models.load import cpu_has_bfloat16

DEAD_ZONE = 0.1
"""So much of a step more is rounded towards 0: fewer bits for little error, as most numbers are small."""

FIRST_TOKENS = 4
RECENT_TOKENS = 128
MAX_CHANNELS = 256
FIT_TOKENS = 768
BASIS_STEP = 0.2
"""Step of the numbers of a basis, in their root mean square, 1 / sqrt(C)."""

BASIS_BITS = 4.4
"""What such a number takes once it is entropy coded."""

REFINEMENT = 3
"""A refinement divides the step by this; odd, so that 0 stays in the middle."""

LARGEST = 127
"""Of the coarse numbers."""

BLOCK_TOKENS = 512
"""So many are coded at a time, which keeps what lies between in the processor's own memory."""


@final
@dataclass(frozen=True, kw_only=True)
class Frame:
    """How whole numbers `[n, C]` stand for values: `mean + (numbers * scales) @ basis`.

    mean, scales `[C]` bfloat16; basis `[C, C]` whole numbers in -128 .. 127, int8, or None: the channels themselves.
    """

    mean: Tensor
    scales: Tensor
    basis: Tensor | None

    @property
    def inverse(self) -> Tensor:
        """`[C, C]` fp32: values without their mean, times this, are numbers in steps."""
        steps = self.scales.float()
        if self.basis is None:
            return steps.reciprocal().diag()
        basis = self.basis.float()
        # it is nearly orthogonal, so that Bᵀ (B Bᵀ)⁻¹ is exact enough, and sooner there than a general inverse
        return basis.T @ torch.cholesky_inverse(torch.linalg.cholesky(basis @ basis.T)) / steps

    def blocks(self, numbers: Tensor, divisor: int) -> Iterator[Tensor]:
        """The values fp32 of whole numbers `[n, C]` in units of a `divisor`-th of a step, BLOCK_TOKENS at a time."""
        mean, scales = self.mean.float(), self.scales.float() / divisor
        basis = None if self.basis is None else self.basis.float()
        is_even = bool((scales == scales[0]).all())
        for block in numbers.split(BLOCK_TOKENS) if len(numbers) else ():
            if self.basis is None or basis is None:
                yield torch.addcmul(mean, block, scales)
            elif is_even and block.dtype == torch.int8 and block.device.type == "cpu":
                # exact, and four times as fast as in fp32
                yield torch._int_mm(block, self.basis).float().mul_(scales[0]).add_(mean)
            else:
                yield torch.addmm(mean, block * scales, basis)


@final
@dataclass(frozen=True, kw_only=True)
class InSteps:
    """Values in the steps of a frame. mean: `[C]` fp32; inverse: `[C, C]`, in whose dtype products are made."""

    mean: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, frame: Frame) -> InSteps:
        return cls(mean=frame.mean.float(), inverse=frame.inverse)

    def rough(self) -> InSteps:
        """In bfloat16 where the processor multiplies it, twice as fast: 0.3 % more error than rounding to whole steps has."""
        can = self.inverse.device.type == "cpu" and cpu_has_bfloat16()
        return replace(self, inverse=self.inverse.bfloat16()) if can else self

    def __call__(self, values: Tensor) -> Tensor:
        """`[m, C]` fp32, a tensor of its own, of `[m, C]` of any kind."""
        return ((values - self.mean).to(self.inverse.dtype) @ self.inverse).float()


@final
@dataclass(frozen=True, kw_only=True)
class Coded:
    """Whole numbers of n tokens. coarse: int8 `[n, C]`; recent: -1 .. 1 `[w, C]`, for the newest w alone; refinements:
    -1 .. 1 `[n, C]` each. A refinement makes of a number x of its tokens 3 x + r, in units of a third of the step."""

    frame: Frame
    coarse: Tensor
    recent: Tensor
    refinements: tuple[Tensor, ...]


def decode(frame: Frame, coarse: Tensor, recent: Tensor, refinements: Sequence[Tensor]) -> Iterator[Tensor]:
    """The values fp32 behind a `Coded` of n tokens, or behind fewer of its refinements: `[m, C]` of some tokens at a time."""
    old = len(coarse) - len(recent)
    numbers, divisor = coarse[:old], 1
    newest = REFINEMENT * coarse[old:].int() + recent
    for r in refinements:
        numbers = REFINEMENT * numbers.int() + r[:old]
        newest = REFINEMENT * newest + r[old:]
        divisor *= REFINEMENT
    yield from frame.blocks(numbers, divisor)
    yield from frame.blocks(newest, REFINEMENT * divisor)


def encode(x: Tensor, basis: Tensor | None, step: float, *, num_refinements: int) -> Coded:
    """Codes values `[n, C]` in a basis of `fit` with a step of `step` in all directions after all refinements."""
    coarsest, channels = step * REFINEMENT**num_refinements, x.shape[1]
    scale = coarsest if basis is None else coarsest / _basis_unit(channels)
    mean = (sample(x).mean(0) if len(x) else x.new_zeros(channels)).bfloat16()
    frame = Frame(mean=mean, scales=torch.full_like(mean, scale), basis=basis)
    coded = _quantized(x, frame, num_refinements)
    if len(x) and int(torch.maximum(coded.coarse.amax(), -coded.coarse.amin())) >= LARGEST:  # some may have been cut
        # doubled until it fits: exact in bfloat16, and the other components keep their step
        doubled = torch.exp2((_peaks(x, frame) / LARGEST).clamp(min=1.0).log2().ceil())
        coded = _quantized(x, replace(frame, scales=frame.scales * doubled.bfloat16()), num_refinements)
    return coded


def _peaks(x: Tensor, frame: Frame) -> Tensor:
    """The largest of each component of values `[n, C]` in steps, `[C]`."""
    in_steps = InSteps.of(frame)
    return torch.stack([in_steps(block).abs().amax(0) for block in x.split(BLOCK_TOKENS)]).amax(0)


def _quantized(x: Tensor, frame: Frame, num_refinements: int) -> Coded:
    num_old = max(0, len(x) - RECENT_TOKENS)
    coarse = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    refinements = [torch.empty_like(coarse) for _ in range(num_refinements)]
    recent, exact = coarse[num_old:].clone(), InSteps.of(frame)
    for part, extra in ((slice(0, num_old), []), (slice(num_old, len(x)), [recent])):
        places = [coarse[part], *extra, *(r[part] for r in refinements)]  # the coarsest first
        in_steps = (
            exact.rough() if len(places) == 1 and frame.basis is not None else exact
        )  # what is finer than a step needs exact products
        for block, *own in zip(*(t.split(BLOCK_TOKENS) for t in (x[part], *places)), strict=True):
            _nest(in_steps(block), own)
    return Coded(frame=frame, coarse=coarse, recent=recent, refinements=tuple(refinements))


def _nest(y: Tensor, places: Sequence[Tensor]) -> None:
    """Writes y `[n, C]` in steps as whole numbers, and refinements of them, the coarsest first, into places `[n, C]`."""
    fine = y.mul_(REFINEMENT ** (len(places) - 1)) if len(places) > 1 else y
    numbers = fine.add_(fine.sign(), alpha=0.5 - DEAD_ZONE)  # whole ones once what is behind the point is cut off
    if len(places) > 1:
        numbers = numbers.abs().floor_().copysign_(numbers)
    for place in reversed(places[1:]):
        coarser = (numbers / REFINEMENT).round_()
        place.copy_(numbers.sub_(coarser, alpha=REFINEMENT))
        numbers = coarser
    places[0].copy_(numbers.clamp_(-LARGEST, LARGEST))


def sample(x: Tensor) -> Tensor:
    """At most FIT_TOKENS rows of x, evenly spread, fp32."""
    return x[:: max(1, -(-len(x) // FIT_TOKENS))].float()


@final
@dataclass(frozen=True, kw_only=True)
class Moments:
    """What a basis is fitted to. together: of how many neighbouring heads at most one may span the tokens; covariances: `[C, C]`
    fp32 of so many side by side; lengths: tokens of each head."""

    together: int
    covariances: list[Tensor]
    lengths: list[int]
    head_dim: int

    @classmethod
    def of(cls, heads: Sequence[Tensor]) -> Moments:
        """From values `[n_h, D]`. Heads of different lengths have each their own basis."""
        num_heads, dim, size = len(heads), heads[0].shape[1], 1
        if len({len(x) for x in heads}) == 1 and len(heads[0]):
            size = max(g for g in range(1, num_heads + 1) if num_heads % g == 0 and (g == 1 or g * dim <= MAX_CHANNELS))
        sampled = [sample(x) for x in heads]
        found = [_covariance(x) for x in join_heads(sampled, size)]
        return cls(together=size, covariances=found, lengths=[len(x) for x in heads], head_dim=dim)

    @property
    def apart(self) -> list[Tensor]:
        """`[D, D]` of each head."""
        starts = range(0, self.together * self.head_dim, self.head_dim)
        return [c[i : i + self.head_dim, i : i + self.head_dim] for c in self.covariances for i in starts]

    @property
    def deviation(self) -> float:
        """The root mean variance of all channels."""
        variances = [c.diagonal().mean() for c, n in zip(self.apart, self.lengths, strict=True) if n]
        return float(torch.stack(variances).mean().sqrt()) if variances else 0.0


def fit(moments: Moments, step: float) -> tuple[int, list[Tensor | None]]:
    """Of how many neighbouring heads one basis best spans the tokens, and the basis of each part, whole numbers.

    0, and None for each head: a basis costs more than it saves.
    """
    apart, dim, size = moments.apart, moments.head_dim, moments.together
    bits = {0: sum(n * _bits(c.diagonal(), step) for c, n in zip(apart, moments.lengths, strict=True))}
    for g, covariances in {1: apart, size: moments.covariances}.items():
        if g * dim <= MAX_CHANNELS:
            rates = [_best_bits(c, step) for c in covariances]
            bits[g] = sum(n * rate for n, rate in zip(moments.lengths[::g], rates, strict=True))
            bits[g] += len(apart) * g * dim**2 * BASIS_BITS
    best = min(bits, key=lambda g: bits[g])
    if best == 0:
        return 0, [None] * len(apart)
    systems = [torch.linalg.eigh(c) for c in (moments.covariances if best > 1 else apart)]
    unit = _basis_unit(best * dim)
    return best, [(system.eigenvectors.T * unit).round_().to(torch.int8).contiguous() for system in systems]


def join_heads(heads: Sequence[Tensor], together: int) -> list[Tensor]:
    """Values `[n, together * D]` of neighbouring heads side by side."""
    return [torch.cat(list(heads[h : h + together]), 1) for h in range(0, len(heads), together)]


def _basis_unit(channels: int) -> float:
    """What stands for 1 in a basis."""
    return channels**0.5 / BASIS_STEP


def _covariance(rows: Tensor) -> Tensor:
    """`[C, C]` of rows `[n, C]`, zeros if there are none."""
    centred = rows - rows.mean(0) if len(rows) else rows
    return centred.T @ centred / max(1, len(rows))


def _bits(variances: Tensor, step: float) -> float:
    """About how many bits a token takes in components of these variances."""
    return float((1 + 12 * variances.clamp(min=0) / step**2).log2().sum() / 2)


def _best_bits(covariance: Tensor, step: float) -> float:
    """`_bits` of the principal components, whose variances need not be known for it."""
    scaled = covariance * (12 / step**2)
    scaled.diagonal().add_(1.0)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if int(failed):  # rounding made a variance negative
        return _bits(torch.linalg.eigvalsh(covariance), step)
    return float(factor.diagonal().log2().sum())
