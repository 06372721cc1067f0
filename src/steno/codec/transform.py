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
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from steno.codec.rotation import turn
from steno.kernels import frame as fused
from steno.models.weights import cpu_has_bfloat16, has_vnni

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


def blocks(num_tokens: int) -> Iterator[slice]:
    """Slices of at most BLOCK_TOKENS tokens."""
    return (slice(at, at + BLOCK_TOKENS) for at in range(0, num_tokens, BLOCK_TOKENS))


@final
@dataclass(frozen=True)
class Side:
    """Keys or values of some heads, `[n, D]` of each, of as many tokens where they are side by side.

    angles: of each head cosines and sines fp32 `[n, R / 2]`, by which it is turned; empty: none is.
    """

    heads: Sequence[Tensor]
    angles: Sequence[tuple[Tensor, Tensor]] = ()

    def of_heads(self, first: int, count: int) -> Side:
        """Some of the heads."""
        return Side(self.heads[first : first + count], self.angles[first : first + count])

    def of_tokens(self, where: slice) -> Side:
        """Some of the tokens, as views."""
        return Side([x[where] for x in self.heads], [(cos[where], sin[where]) for cos, sin in self.angles])

    def rows(self, where: slice) -> Tensor:
        """Tokens of all heads side by side before they were turned, `[m, C]` fp32, a tensor of its own."""
        rows = torch.cat([x[where] for x in self.heads], 1).float()
        for part, (cos, sin) in zip(rows.chunk(len(self.heads), 1), self.angles, strict=False):
            turn(part, cos[where], -sin[where])
        return rows

    def put(self, where: slice, rows: Tensor) -> None:
        """Writes such rows, turned, to their places; they are changed."""
        parts = rows.chunk(len(self.heads), 1)
        for part, (cos, sin) in zip(parts, self.angles, strict=False):
            turn(part, cos[where], sin[where])
        for place, part in zip(self.heads, parts, strict=True):
            place[where] = part


@final
@dataclass(frozen=True, kw_only=True)
class Frame:
    """How whole numbers `[n, C]` stand for values: `mean + (numbers * scales) @ basis`.

    mean, scales `[C]` bfloat16; basis `[C, C]` whole numbers in -128 .. 127, int8, or None: the channels themselves.
    """

    mean: Tensor
    scales: Tensor
    basis: Tensor | None

    def write(self, numbers: Tensor, divisor: int, side: Side) -> None:
        """Writes the values of whole numbers `[n, C]`, in units of a `divisor`-th of a step, into a side of n tokens."""
        mean, scales = self.mean.float(), self.scales.float() / divisor
        basis, is_whole = self.basis, numbers.dtype == torch.int8 and bool((scales == scales[0]).all())
        if basis is not None and is_whole and fused.can_fuse(side.heads):
            fused.decode(numbers, basis, float(scales[0]), mean, side.heads, side.angles)
            return
        for where in blocks(len(numbers)):
            block = numbers[where]
            if basis is None:
                values = torch.addcmul(mean, block, scales)
            elif is_whole:
                values = _whole_product(block, basis).mul_(scales[0]).add_(mean)
            else:
                values = torch.addmm(mean, block * scales, basis.float())
            side.put(where, values)


@final
@dataclass(frozen=True, kw_only=True)
class InSteps:
    """Values in the steps of a frame. mean: `[C]` fp32; inverse: `[C, C]`, in whose dtype products are made."""

    mean: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, frame: Frame, directions: Tensor | None, rounds: int) -> InSteps:
        """directions: what the basis is in whole numbers, fp32, orthogonal, so that Newton's iteration begins near its inverse:
        each of the rounds squares the error, an eighth at first."""
        inverse = torch.eye(len(frame.mean), device=frame.mean.device)
        if directions is not None and frame.basis is not None:
            inverse, basis = directions.T / _basis_unit(len(directions)), frame.basis.float()
            for _ in range(rounds):
                inverse = torch.addmm(inverse, inverse, basis @ inverse, beta=2, alpha=-1)
        return cls(mean=frame.mean.float(), inverse=inverse / frame.scales.float())

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


def _whole_product(numbers: Tensor, basis: Tensor) -> Tensor:
    """The product of whole numbers in 8 bits, fp32 `[m, C]`, exact: sums stay below 2^22 where C <= 256."""
    if numbers.device.type == "cpu" and has_vnni():
        return torch._int_mm(numbers, basis).float()  # four times as fast as in fp32; without VNNI 30 times as slow
    return numbers.float() @ basis.float()


def decode(frame: Frame, coarse: Tensor, recent: Tensor, refinements: Sequence[Tensor], side: Side) -> None:
    """Writes the values behind a `Coded` of n tokens, or behind fewer of its refinements, into a side of n tokens."""
    old = len(coarse) - len(recent)
    numbers, divisor = coarse[:old], 1
    newest = REFINEMENT * coarse[old:].int() + recent
    for r in refinements:
        numbers = REFINEMENT * numbers.int() + r[:old]
        newest = REFINEMENT * newest + r[old:]
        divisor *= REFINEMENT
    frame.write(numbers, divisor, side.of_tokens(slice(0, old)))
    frame.write(newest, REFINEMENT * divisor, side.of_tokens(slice(old, None)))


def encode(side: Side, mean: Tensor, directions: Tensor | None, step: float, *, num_refinements: int) -> Coded:
    """Codes values in directions of `fit` with a step of `step` in each after all refinements. mean: `[C]`."""
    coarsest = step * REFINEMENT**num_refinements
    unit = 1.0 if directions is None else _basis_unit(len(mean))
    basis = None if directions is None else (directions * unit).round_().to(torch.int8)
    mean = mean.bfloat16()
    frame = Frame(mean=mean, scales=torch.full_like(mean, coarsest / unit), basis=basis)
    # products that are rounded to whole steps may be rough
    in_steps = InSteps.of(frame, directions, rounds=3 if num_refinements else 1)
    coded, largest = _quantized(side, frame, in_steps, num_refinements)
    if largest >= LARGEST:  # some may have been cut
        # doubled until it fits: exact in bfloat16, and the other components keep their step
        doubled = torch.exp2((_peaks(side, in_steps) / LARGEST).clamp(min=1.0).log2().ceil())
        frame = replace(frame, scales=frame.scales * doubled.bfloat16())
        coded, _ = _quantized(side, frame, replace(in_steps, inverse=in_steps.inverse / doubled), num_refinements)
    return coded


def _peaks(side: Side, in_steps: InSteps) -> Tensor:
    """The largest of each component in steps, `[C]`."""
    return torch.stack([in_steps(side.rows(where)).abs().amax(0) for where in blocks(len(side.heads[0]))]).amax(0)


def _quantized(side: Side, frame: Frame, in_steps: InSteps, num_refinements: int) -> tuple[Coded, int]:
    """The numbers, and the size of the largest coarse one."""
    num_tokens, channels = len(side.heads[0]), len(frame.mean)
    num_old = max(0, num_tokens - RECENT_TOKENS)
    coarse = torch.empty(num_tokens, channels, dtype=torch.int8, device=side.heads[0].device)
    refinements = [torch.empty_like(coarse) for _ in range(num_refinements)]
    recent = coarse[num_old:].clone()
    old, newest = side.of_tokens(slice(0, num_old)), side.of_tokens(slice(num_old, None))
    _nest(in_steps, newest, [coarse[num_old:], recent, *(r[num_old:] for r in refinements)])
    if num_refinements or frame.basis is None or not fused.can_fuse(side.heads):
        # what is finer than a step needs exact products
        rough = in_steps if num_refinements or frame.basis is None else in_steps.rough()
        _nest(rough, old, [coarse[:num_old], *(r[:num_old] for r in refinements)])
        largest = _largest(coarse)
    else:
        inverse = in_steps.inverse.bfloat16()
        largest = fused.encode(old.heads, inverse, 0.5 - DEAD_ZONE, in_steps.mean, coarse[:num_old], old.angles)
        largest = max(largest, _largest(coarse[num_old:]))
    return Coded(frame=frame, coarse=coarse, recent=recent, refinements=tuple(refinements)), largest


def _largest(numbers: Tensor) -> int:
    """The largest size of whole numbers, none of them -128; 0 where there are none."""
    return int(numbers.abs().amax()) if numbers.numel() else 0


def _nest(in_steps: InSteps, side: Side, places: Sequence[Tensor]) -> None:
    """Writes values in steps as whole numbers, and refinements of them, the coarsest first, into places `[n, C]`."""
    for where in blocks(len(places[0])):
        numbers = in_steps(side.rows(where)).mul_(REFINEMENT ** (len(places) - 1))
        numbers.add_(numbers.sign(), alpha=0.5 - DEAD_ZONE)  # whole ones once what is behind the point is cut off
        if len(places) > 1:
            numbers = numbers.abs().floor_().copysign_(numbers)
        for place in reversed(places[1:]):
            coarser = (numbers / REFINEMENT).round_()
            place[where] = numbers.sub_(coarser, alpha=REFINEMENT)
            numbers = coarser
        places[0][where] = numbers.clamp_(-LARGEST, LARGEST)


@final
@dataclass(frozen=True, kw_only=True)
class Moments:
    """What a basis is fitted to, of at most FIT_TOKENS tokens, evenly spread.

    together: of how many neighbouring heads at most one may span the tokens; covariances: `[C, C]` fp32 of so many side by
    side; means: `[D]` fp32 and lengths: tokens of each head.
    """

    together: int
    covariances: list[Tensor]
    means: list[Tensor]
    lengths: list[int]

    @classmethod
    def of(cls, side: Side) -> Moments:
        """Heads of different lengths have each their own basis."""
        lengths, dim, size = [len(x) for x in side.heads], side.heads[0].shape[1], 1
        num_heads = len(lengths)
        if len(set(lengths)) == 1 and lengths[0]:
            size = max(g for g in range(1, num_heads + 1) if num_heads % g == 0 and (g == 1 or g * dim <= MAX_CHANNELS))
        means, covariances = list[Tensor](), []
        for h in range(0, num_heads, size):
            rows = side.of_heads(h, size).rows(slice(None, None, max(1, -(-lengths[h] // FIT_TOKENS))))
            mean = rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1])
            rows -= mean
            covariances.append(rows.T @ rows / max(1, len(rows)))
            means += mean.chunk(size)
        return cls(together=size, covariances=covariances, means=means, lengths=lengths)

    @property
    def head_dim(self) -> int:
        return len(self.means[0])

    @cached_property
    def apart(self) -> Tensor:
        """`[H, D, D]` of each head."""
        parts = [c.unflatten(0, (self.together, -1)).unflatten(2, (self.together, -1)) for c in self.covariances]
        return torch.cat([part.diagonal(dim1=0, dim2=2).permute(2, 0, 1) for part in parts])

    @property
    def deviation(self) -> float:
        """The root mean variance of all channels."""
        variances = self.apart.diagonal(dim1=1, dim2=2).mean(1).tolist()
        held = [variance for variance, n in zip(variances, self.lengths, strict=True) if n]
        return (sum(held) / len(held)) ** 0.5 if held else 0.0


def fit(moments: Moments, step: float) -> tuple[int, list[Tensor | None]]:
    """Of how many neighbouring heads one basis best spans the tokens, and of each part its directions, `[C, C]` orthogonal.

    0, and None for each head: a basis costs more than it saves.
    """
    apart, dim, size, lengths = (
        moments.apart,
        moments.head_dim,
        moments.together,
        torch.tensor(moments.lengths).double(),
    )
    bits = {0: float(lengths @ _bits(apart.diagonal(dim1=1, dim2=2), step))}
    for g, covariances in {1: apart, size: torch.stack(moments.covariances)}.items():
        if g * dim <= MAX_CHANNELS:
            bits[g] = float(lengths[::g] @ _best_bits(covariances, step)) + len(apart) * g * dim**2 * BASIS_BITS
    best = min(bits, key=lambda g: bits[g])
    if best == 0:
        return 0, [None] * len(apart)
    # of the upper half, as rows here are the columns of LAPACK: a little sooner
    return best, [torch.linalg.eigh(c, UPLO="U").eigenvectors.T for c in (moments.covariances if best > 1 else apart)]


def _basis_unit(channels: int) -> float:
    """What stands for 1 in a basis."""
    return channels**0.5 / BASIS_STEP


def _bits(variances: Tensor, step: float) -> Tensor:
    """About how many bits a token takes in components of these variances `[B, C]`, fp64 `[B]`."""
    return (1 + 12 * variances.clamp(min=0) / step**2).log2().sum(-1).double() / 2


def _best_bits(covariances: Tensor, step: float) -> Tensor:
    """`_bits` of the principal components, whose variances need not be known for it, of `[B, C, C]`."""
    scaled = covariances * (12 / step**2)
    scaled.diagonal(dim1=1, dim2=2).add_(1.0)
    factors, failed = torch.linalg.cholesky_ex(scaled)
    if bool(failed.any()):  # rounding made a variance negative
        return _bits(torch.linalg.eigvalsh(covariances), step)
    return factors.diagonal(dim1=1, dim2=2).log2().sum(-1).double()
