"""CommVQ: codewords commute with RoPE, codes pack, the bits of values come near, and what calibration fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_layers import learned_file

from steno.cache.accounting import held_bytes
from steno.calibration import save_calibration
from steno.errors import CalibrationError
from steno.kernels.quant.packing import code_bytes
from steno.learn.commvq import best_centres, draw_centres, fit_centres, fit_rows
from steno.methods.quantize.commvq import (
    CENTRES,
    CommVQ,
    codeword,
    decode_keys,
    encode_bits,
    encode_keys,
    nearest_codewords,
    num_stages,
    pack_codes,
    turned,
    unpack_codes,
)
from steno.types import KeptTokens, Rope

DIM = 16
ROPE = Rope(inv_freq=100.0 ** (-torch.arange(0, DIM, 2) / DIM))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alike(n: int, dim: int = DIM, seed: int = 0) -> torch.Tensor:
    """Unit vectors `[n, dim]` near a few directions."""
    kinds = draw(12, dim, seed=100)
    which = torch.randint(12, (n,), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(kinds[which] + 0.5 * draw(n, dim, seed=seed), dim=1)


def tokens_of(keys: torch.Tensor, values: torch.Tensor, **options: Any) -> KeptTokens:
    where = torch.arange(len(keys))
    return KeptTokens(keys=[keys], values=[values], positions=[where], layer_idx=0, num_layers=1, **options)


def drawn(num_tokens: int) -> torch.Tensor:
    return draw_centres(1, 1, num_tokens, DIM, torch.Generator().manual_seed(0))[0, 0]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Codebooks of one layer and head, fitted to vectors that are alike."""
    keys, values = alike(2048), alike(2048, seed=1)
    tensors = {"key_centres": fit_centres(keys, drawn(len(keys)))}
    tensors |= {f"value_rows_{bits}": fit_rows(values[None], bits)[0] for bits in (2, 1)}
    path = tmp_path_factory.mktemp("commvq") / "fitted"
    save_calibration(path, {name: x[None, None].half() for name, x in tensors.items()}, {})
    return str(path)


def test_codewords_commute_with_rope() -> None:
    centres, codes = draw(CENTRES, DIM), torch.randint(CENTRES**2, (50,), generator=torch.Generator().manual_seed(0))
    for position in (1, 7, 1000):
        where = torch.full((CENTRES,), position)
        moved = ROPE.apply(centres, where)
        torch.testing.assert_close(
            ROPE.apply(codeword(codes, centres), where[:50]), codeword(codes, moved), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(ROPE.apply(turned(centres), where), turned(moved), atol=1e-5, rtol=1e-5)


def test_the_nearest_codeword_is_the_nearest_of_all() -> None:
    centres, x = draw(CENTRES, DIM), draw(700, DIM, seed=1) * 2
    every = codeword(torch.arange(CENTRES**2), centres)  # [4096, D]
    found = nearest_codewords(x, centres)
    distances = torch.cdist(x, every)
    torch.testing.assert_close(distances.gather(1, found[:, None])[:, 0], distances.amin(1), atol=1e-4, rtol=1e-5)


def test_sums_of_codewords_decode_and_codes_pack() -> None:
    centres = draw(3, CENTRES, DIM)
    codes = encode_keys(draw(40, DIM, seed=1), centres)
    assert codes.shape == (40, 3)
    expected = sum(codeword(codes[:, r], centres[r]) for r in range(3))
    torch.testing.assert_close(decode_keys(codes, centres), expected)
    packed = pack_codes(codes)
    assert (packed.dtype, packed.shape) == (torch.uint8, (40, 6))
    assert torch.equal(unpack_codes(packed, 3), codes)
    assert torch.equal(unpack_codes(pack_codes(codes[:, :2]), 2), codes[:, :2])


def test_k_means_has_the_least_squares_for_its_codes() -> None:
    x, before = alike(500), draw(CENTRES, DIM, seed=3) / 4
    codes = nearest_codewords(x, before)
    found = best_centres(x, codes, before)
    error = (x - codeword(codes, found)).square().sum()
    assert error < (x - codeword(codes, before)).square().sum()
    for seed in range(5):  # and no step from there is better
        other = found + 1e-2 * draw(CENTRES, DIM, seed=seed)
        assert (x - codeword(codes, other)).square().sum() > error


def test_each_stage_takes_something_away() -> None:
    x = alike(1024)
    centres = fit_centres(x, drawn(len(x)))
    assert centres.shape == (num_stages(DIM, 2), CENTRES, DIM)
    new = alike(300, seed=9)
    errors = []
    for count in range(len(centres) + 1):
        rest = new - decode_keys(encode_keys(new, centres[:count]), centres[:count]) if count else new
        errors.append(float(rest.square().mean()))
    assert all(b < a for a, b in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.25 * errors[0]
    again = fit_centres(x, drawn(len(x)))
    assert torch.equal(centres, again)


def test_bits_are_such_that_no_single_one_would_be_better() -> None:
    rows, x = draw(9, 8), draw(20, 8, seed=1)
    start = torch.zeros(20, 8, dtype=torch.bool)
    bits = start
    for _ in range(20):  # sweeps until nothing moves
        bits = encode_bits(x, rows, bits)
    error = (x - bits.float() @ rows[:-1] - rows[-1]).square().sum(1)
    assert (error <= (x - rows[-1]).square().sum(1)).all()
    for i in range(8):
        other = bits.clone()
        other[:, i] ^= True
        assert ((x - other.float() @ rows[:-1] - rows[-1]).square().sum(1) >= error - 1e-4).all()
    both = encode_bits(torch.stack([x, x]), torch.stack([rows, rows]), torch.stack([bits, bits]))
    assert torch.equal(both[0], both[1])
    assert not start.any()


def test_rows_are_fitted_to_values() -> None:
    x = alike(1024, seed=1)[None]
    errors = []
    for bits in (1, 2):
        rows = fit_rows(x, bits)
        assert rows.shape == (1, bits * DIM + 1, DIM)
        on = encode_bits(x, rows).float()
        errors.append(float((x - on @ rows[:, :-1] - rows[:, -1:]).square().mean() / x.square().mean()))
    assert errors[1] < errors[0] < 0.4
    assert errors[1] < 0.13


@pytest.mark.parametrize("bits", [2, 1])
def test_lengths_are_kept_and_products_are_those_of_the_decoded_tokens(fitted: str, bits: int) -> None:
    scale = 5 * torch.rand(640, 1, generator=torch.Generator().manual_seed(2))
    plain, values = alike(640, seed=5) * scale, alike(640, seed=6) * scale
    keys = ROPE.apply(plain, torch.arange(640))
    segment = CommVQ(bits=bits, weights=fitted).encode(tokens_of(keys, values, rope=ROPE))
    head, ((k, v),) = segment.heads[0], segment.decode(torch.float32)
    torch.testing.assert_close(v.norm(dim=1), values.norm(dim=1), rtol=2e-3, atol=1e-3)
    errors = [float((x - y).square().sum() / x.square().sum()) for x, y in ((keys, k), (values, v))]
    assert max(errors) < {2: 0.3, 1: 0.5}[bits]
    q, w = draw(3, DIM), torch.rand(3, 640, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head.logits(q), q @ k.T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(head.mix(w), w @ v, atol=1e-2, rtol=1e-3)
    stages = num_stages(DIM, bits)
    of_page = code_bytes(64, bits * DIM, 1)
    assert held_bytes(segment) == 640 * (3 * -(-stages // 2) + 2 + 2) + 10 * of_page + 4 * DIM // 2  # the last: RoPE's


def test_a_token_is_encoded_by_itself(fitted: str) -> None:
    keys, values = alike(256, seed=7), alike(256, seed=8)
    method = CommVQ(weights=fitted)
    ((k, v),) = method.encode(tokens_of(keys, values)).decode(torch.float32)
    parts = [
        method.encode(tokens_of(keys[a : a + 64], values[a : a + 64])).decode(torch.float32) for a in (0, 64, 128, 192)
    ]
    torch.testing.assert_close(torch.cat([part[0][0] for part in parts]), k, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.cat([part[0][1] for part in parts]), v, atol=1e-6, rtol=0)


def test_zeros_stay_zeros(fitted: str) -> None:
    zeros = torch.zeros(64, DIM)
    ((k, v),) = CommVQ(weights=fitted).encode(tokens_of(zeros, zeros)).decode(torch.float32)
    assert not k.any()
    assert not v.any()


def test_without_its_codebooks_it_says_what_makes_them(tmp_path: Path) -> None:
    keys = draw(64, DIM)
    with pytest.raises(CalibrationError, match="run `steno calibrate commvq --model M` once"):
        CommVQ().encode(tokens_of(keys, keys))
    other = learned_file("commvq", 2, 1, 1, DIM)
    with pytest.raises(CalibrationError, match=r"must be those of this model.*calibrate on this model"):
        CommVQ(weights=other).encode(tokens_of(keys, keys))
