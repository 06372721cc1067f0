"""KVQuant: the codebook, outliers, rotation, and products with what is packed."""

import pytest
import torch

from steno.cache.accounting import held_bytes
from steno.calibration import save_calibration
from steno.errors import CalibrationError
from steno.kernels.quant.codebooks import lloyd_max
from steno.methods.quantize.kvquant import TAILS, KVQuant, fit_levels
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


@pytest.mark.parametrize(("n", "heads", "dim", "bits", "share", "step"), [
    (64, 1, 64, 4, 0.01, 1), (192, 2, 80, 2, 0.05, 1), (128, 3, 24, 4, 0.0, 2),
])  # fmt: skip
def test_bytes_are_codes_scales_places_and_outliers(n, heads, dim, bits, share, step):
    g = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(heads, n, dim, generator=g) for _ in range(2))
    positions, rope = [step * torch.arange(n)] * heads, Rope(inv_freq=1 / torch.arange(1, dim // 2 + 1))
    tokens = KeptTokens(keys=[*keys], values=[*values], positions=positions, layer_idx=0, num_layers=1, rope=rope)
    codes = n * bits // 32 * -(-dim // 16) * 64
    of_channels, of_tokens = dim * (2 + 2), n * (2 + 2)  # a scale and a middle in fp16
    outliers = 2 * int(share / 2 * n + 0.5) * dim + int(share * n * dim)  # at both ends of each channel; of all values
    places = 4 * n if step > 1 else 0
    levels = 16 * 4  # a table
    head = 2 * (codes + levels) + of_channels + of_tokens + outliers * (4 + 2) + places
    assert held_bytes(KVQuant(bits=bits, outliers=share).encode(tokens)) == heads * head + dim // 2 * 4


def test_bytes_of_calibrated_outliers_end_at_their_share(tmp_path):
    keys, values = draw(n=128)
    method = KVQuant(statistics=a_file(tmp_path, keys), outliers=0.02)
    codes, of_channels, of_tokens = 128 * 4 // 32 * 4 * 64, 64 * (2 + 2), 128 * (2 + 2)
    levels = 16 * 4  # a table, of the layer
    head = 2 * (codes + levels) + of_channels + of_tokens + 2 * int(0.02 * 128 * 64) * (4 + 2)
    assert held_bytes(encoded(method, 10 * keys, values, rope=None)) == head


def a_file(tmp_path, keys, name="fitted", heads=1):
    """What a calibration on these keys `[n, D]` and values alike gives one layer."""
    tails = torch.tensor(TAILS)
    tensors = {"key_low": torch.quantile(keys, tails, dim=0), "key_high": torch.quantile(keys, 1 - tails, dim=0)}
    tensors = {name: x.T.expand(1, heads, -1, -1) for name, x in tensors.items()}
    for bits in (4, 2):
        levels = torch.tensor(lloyd_max(bits)) / 3
        tensors |= {f"{side}_levels_{bits}": levels[None].clone() for side in ("key", "value")}
    save_calibration(tmp_path / name, tensors, {})
    return str(tmp_path / name)


def test_what_was_calibrated_holds_for_every_token_by_itself(tmp_path):
    keys, values = draw(n=512)
    method = KVQuant(statistics=a_file(tmp_path, keys), outliers=0.0)
    ((k, v),) = encoded(method, keys, values, rope=None).decode(torch.float32)
    assert relative(keys, k) < 0.03
    assert relative(values, v) < 0.03
    parts = [encoded(method, keys[a : a + 64], values[a : a + 64], rope=None) for a in range(0, 512, 64)]
    decoded = [part.decode(torch.float32)[0] for part in parts]
    assert torch.equal(torch.cat([x for x, _ in decoded]), k)
    assert torch.equal(torch.cat([x for _, x in decoded]), v)


def test_calibrated_outliers_have_a_fixed_room(tmp_path):
    keys, values = draw(n=256)
    method = KVQuant(statistics=a_file(tmp_path, keys), outliers=0.02)
    head = encoded(method, keys, values, rope=None).heads[0]
    assert 0.7 * 0.02 * keys.numel() < len(head.key_outliers.places) <= 0.02 * keys.numel()
    far = encoded(method, 10 * keys, values, rope=None)
    assert len(far.heads[0].key_outliers.places) == int(0.02 * keys.numel())
    places = far.heads[0].key_outliers.places.long()
    assert (places.diff() > 0).all()
    ((k, _),) = far.decode(torch.float32)
    torch.testing.assert_close(k.flatten()[places], 10 * keys.flatten()[places], atol=2e-2, rtol=1e-3)
    low, high = (torch.quantile(keys, x, dim=0) for x in (0.01, 0.99))
    beyond = (torch.maximum(low - 10 * keys, 10 * keys - high) / (high - low)).flatten()
    assert beyond[places].min() >= beyond.sort().values[-len(places) - 2]


def test_a_file_of_another_model_is_refused(tmp_path):
    keys, values = draw(n=64)
    method = KVQuant(statistics=a_file(tmp_path, keys, heads=2))
    with pytest.raises(CalibrationError, match=r"\[1, 1, 64, 11\]; got \[1, 2, 64, 11\].*calibrate on this model"):
        encoded(method, keys, values)


def test_thresholds_lie_between_those_of_the_file(tmp_path):
    keys, values = draw(n=64)
    path = a_file(tmp_path, keys)
    ranges = [
        encoded(KVQuant(statistics=path, outliers=share), keys, values, rope=None).heads[0].ranges
        for share in (0.0, 0.002, 0.003, 0.005, 1.0)
    ]
    assert all((a >= b).all() for a, b in zip(ranges, ranges[1:], strict=False))
    middle = (ranges[1] + 2 * (ranges[3] - ranges[1]) / 6).float()  # 0.0015 from 0.001 on to 0.0025
    torch.testing.assert_close(ranges[2].float(), middle, atol=2e-3, rtol=0)


def test_weights_draw_levels_to_what_matters():
    x = torch.linspace(-1, 1, 4001)
    even, drawn = (torch.tensor(fit_levels(x, 2, weights)) for weights in (torch.ones(4001), (x > 0.5).float() + 1e-3))
    torch.testing.assert_close(even, torch.tensor([-0.75, -0.25, 0.25, 0.75]), atol=2e-2, rtol=0)
    assert (drawn > 0.5).sum() >= 3
