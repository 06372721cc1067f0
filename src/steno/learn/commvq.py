"""The codebooks of CommVQ: centres of keys before RoPE by k-means, stage after stage, and rows of values by least squares."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steno.learn.checkpoint import by_layer
from steno.learn.gather import look
from steno.learn.options import Options
from steno.learn.pieces import pieces
from steno.methods.quantize.commvq import BITS, CENTRES, codeword, encode_bits, nearest_codewords, num_stages
from steno.session import LanguageModel
from steno.types import Need

PIECES, PIECE_TOKENS = 8, 512
KEY_STEPS, VALUE_STEPS = 4, 4
VALUE_TOKENS = 2048
RIDGE = 1e-3


def learn(lm: LanguageModel, text: str, options: Options) -> Mapping[str, Tensor]:
    """What `TENSORS` of the method names, fp16."""
    parts = pieces(lm, text, count=PIECES, size=PIECE_TOKENS, seed=options.seed)
    keys, values = [], []
    for number, tokens in enumerate(parts):
        options.report("reading", number, len(parts) + lm.model.config.get_text_config().num_hidden_layers)
        seen = look(lm, tokens, Need.PRE_ROPE_KEYS)
        keys.append(torch.stack([obs.pre_rope_keys for _, obs in seen if obs.pre_rope_keys is not None]))
        values.append(torch.stack([kv.values for kv, _ in seen]))
    directions = [_directions(torch.cat(x, dim=2)) for x in (keys, values)]  # [L, Hkv, n, D]
    layers = list(zip(*directions, strict=True))
    heads, num_tokens, dim = directions[0].shape[1:]
    drawn = draw_centres(len(layers), heads, num_tokens, dim, torch.Generator().manual_seed(options.seed))

    def fit(layer_idx: int) -> dict[str, Tensor]:
        k, v = layers[layer_idx]
        few = v[:, :: -(-v.shape[1] // VALUE_TOKENS)]
        centres = [fit_centres(head, places) for head, places in zip(k, drawn[layer_idx], strict=True)]
        return {"key_centres": torch.stack(centres)} | {f"value_rows_{bits}": fit_rows(few, bits) for bits in BITS}

    return {name: x.half() for name, x in by_layer(len(layers), fit, options, before=len(parts)).items()}


def _directions(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.float(), dim=-1)


def draw_centres(layers: int, heads: int, num_tokens: int, dim: int, generator: torch.Generator) -> Tensor:
    """The tokens `[L, Hkv, R, 64]` that k-means begins with: all at once, so that they are the same after an interruption."""
    return torch.randint(num_tokens, (layers, heads, num_stages(dim, 2), CENTRES), generator=generator)


def fit_centres(x: Tensor, drawn: Tensor) -> Tensor:
    """Centres `[R, 64, D]` for x `[n, D]`, of a stage for what those before it leave, begun with tokens `drawn` `[R, 64]`."""
    stages = []
    for places in drawn:
        centres = x[places.to(x.device)] / 2**0.5  # a codeword is the sum of two
        for _ in range(KEY_STEPS):
            centres = best_centres(x, nearest_codewords(x, centres), centres)
        stages.append(centres)
        x = x - codeword(nearest_codewords(x, centres), centres)
    return torch.stack(stages)


def best_centres(x: Tensor, codes: Tensor, before: Tensor) -> Tensor:
    """The centres `[64, D]` with the least squared error on x `[n, D]` whose codewords are `codes` `[n]`.

    With complex x = a + ib it is one Hermitian system for all dimensions; unused centres stay near what they were.
    """
    z, old = (torch.complex(*half.chunk(2, dim=1)) for half in (x, before))  # [n, D / 2], [64, D / 2]
    first, second = codes // CENTRES, codes % CENTRES
    pairs = torch.bincount(codes, minlength=CENTRES**2).view(CENTRES, CENTRES).to(x.dtype)
    uses = pairs.sum(0) + pairs.sum(1) + RIDGE
    system = torch.complex(torch.diag(uses), pairs - pairs.T)
    sums = torch.zeros_like(old).index_add(0, first, z) - 1j * torch.zeros_like(old).index_add(0, second, z)
    solved = torch.linalg.solve(system, sums + RIDGE * old)
    return torch.cat([solved.real, solved.imag], dim=1)


def fit_rows(x: Tensor, bits: int) -> Tensor:
    """Rows `[Hkv, m + 1, D]` for x `[Hkv, n, D]`, begun with scalar quantizers of the principal directions."""
    mean = x.mean(1, keepdim=True)
    _, deviations, directions = torch.linalg.svd((x - mean) / x.shape[1] ** 0.5, full_matrices=False)
    steps = (0.98, 0.53) if bits == 2 else (0.8,)  # half of what a bit turns, in deviations
    halves = torch.cat([step * deviations[..., None] * directions for step in steps], dim=1)  # [Hkv, m, D]
    rows = torch.cat([2 * halves, mean - halves.sum(1, keepdim=True)], dim=1)
    codes = None
    for _ in range(VALUE_STEPS):
        codes = encode_bits(x, rows, codes, sweeps=1)
        on = torch.cat([codes.to(x.dtype), torch.ones_like(x[..., :1])], dim=2)  # [Hkv, n, m + 1]
        ridge = RIDGE * torch.eye(on.shape[2], device=x.device)
        rows = torch.linalg.solve(on.mT @ on + ridge, on.mT @ x + RIDGE * rows)
    return rows
