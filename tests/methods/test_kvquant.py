"""KVQuant: the codebook, outliers, rotation, and products with what is packed."""

import pytest
import torch

from steno.kernels.quant.codebooks import lloyd_max
from steno.methods.quantize.kvquant import KVQuant, fit_levels
from steno.types import KeptTokens, Rope

ROPE = Rope(inv_freq=10000.0 ** (-torch.arange(0, 64, 2) / 64))


def encoded(method, keys, values, positions=None, rope=ROPE):
    positions = torch.arange(keys.shape[0]) if positions is None else positions
    return method.encode(
        KeptTokens(keys=[keys], values=[values], positions=[positions], layer_idx=0, num_layers=1, rope=rope)
    )


def draw(n=256, dim=64, seed=0):
    return torch.randn(2, n, dim, generator=torch.Generator().manual_seed(seed)).unbind()


def relative(x, y):
    return float((x - y).square().sum() / x.square().sum())


@pytest.mark.parametrize("bits", [2, 4])
def test_levels_of_gaussian_data_are_lloyd_and_max(bits):
    x = torch.randn(8192, generator=torch.Generator().manual_seed(0)) / 5
    found, right = torch.tensor(fit_levels(x, bits)), torch.tensor(lloyd_max(bits)) / 5
    assert (found - right).abs().max() < (0.01 if bits == 2 else 0.1)
    cells = [(x[:, None] - levels).abs().amin(1).square().mean() for levels in (found, right)]
    assert cells[0] <= 1.05 * cells[1]


def test_what_few_numbers_there_are_is_exact():
    assert fit_levels(torch.zeros(9), 2) == (0.0,) * 4
    keys = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).sign().expand(128, -1)
    ((k, v),) = encoded(KVQuant(bits=2), keys, keys, rope=None).decode(torch.float32)
    torch.testing.assert_close(k, keys, atol=2e-3, rtol=0)
    torch.testing.assert_close(v, keys, atol=2e-3, rtol=0)


def test_keys_are_coded_before_rotation():
    keys, values = draw()
    keys = keys * 0.05 + 4 * torch.randn(64, generator=torch.Generator().manual_seed(3))  # channels with means
    rotated = ROPE.apply(keys, torch.arange(256))
    ((k, _),) = encoded(KVQuant(), rotated, values).decode(torch.float32)
    ((plain, _),) = encoded(KVQuant(), keys, values, rope=None).decode(torch.float32)
    # rotation keeps lengths, so the error is that of the keys before it
    assert float((k - rotated).norm()) == pytest.approx(float((plain - keys).norm()), rel=0.05)
    ((after, _),) = encoded(KVQuant(), rotated, values, rope=None).decode(torch.float32)
    assert relative(rotated, k) < 0.1 * relative(rotated, after)


def test_positions_need_not_follow_each_other():
    keys, values = draw(n=64)
    positions = torch.arange(64) * 3 + 5
    segment = encoded(KVQuant(), ROPE.apply(keys, positions), values, positions)
    assert torch.equal(segment.heads[0].positions, positions.int())
    ((k, _),) = segment.decode(torch.float32)
    assert relative(ROPE.apply(keys, positions), k) < 0.02
    assert encoded(KVQuant(), keys, values, torch.arange(7, 71)).heads[0].positions == 7


def test_everything_apart_is_exact():
    keys, values = draw(n=64)
    segment = encoded(KVQuant(bits=2, outliers=1.0), keys, values, rope=None)
    ((k, v),) = segment.decode(torch.float32)
    assert relative(values, v) < 1e-6
    assert relative(keys, k) < 1e-3  # two numbers of each channel are left, its middle


def test_outliers_make_room_for_the_others():
    keys, values = draw()
    keys[::100] *= 30
    values[3, 7], values[200, 1] = 100.0, -80.0
    errors = []
    for share in (0.0, 0.02):
        ((k, v),) = encoded(KVQuant(outliers=share), keys, values, rope=None).decode(torch.float32)
        errors.append((relative(keys, k), relative(values, v)))
    assert errors[1][0] < 0.2 * errors[0][0]
    assert errors[1][1] < errors[0][1]
    assert abs(float(v[3, 7]) - 100) < 0.1
    assert abs(float(v[200, 1]) + 80) < 0.1


@pytest.mark.parametrize("n", [64, 576])
def test_products_are_those_of_the_decoded_tokens(n):
    keys, values = draw(n=n)
    segment = encoded(KVQuant(bits=2), keys, values)
    head, ((k, v),) = segment.heads[0], segment.decode(torch.float32)
    g = torch.Generator().manual_seed(1)
    q, w = torch.randn(3, 64, generator=g), torch.rand(3, n, generator=g)
    torch.testing.assert_close(head.logits(q), q @ k.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head.mix(w), w @ v, atol=2e-3, rtol=1e-4)
