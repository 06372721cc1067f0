"""What holds of the quantizers that put several parts together: GEAR, VidKV, ZipCache."""

import math

import pytest
import torch

from steno.cache.accounting import held_bytes
from steno.cache.row import unpack_kept
from steno.methods.quantize.gear import GEAR, low_rank, outlier_columns
from steno.methods.quantize.vidkv import VidKV, VidKVSTP, fourier
from steno.methods.quantize.zipcache import ZipCache, normalized_attention
from steno.types import KeptTokens, Observation


def tokens_of(keys, values, mass=None, **seen):
    """keys, values `[Hkv, n, D]`; mass `[H, n]`, what a prompt's attention was; seen: what else was observed of one."""
    observation = None
    if mass is not None or seen:
        observation = Observation(layer_idx=0, num_layers=1, scaling=1.0, budget_tokens=1, attention_mass=mass, **seen)
    return KeptTokens(
        keys=list(keys), values=list(values), positions=[torch.arange(keys.shape[1])] * len(keys), layer_idx=0,
        num_layers=1, observation=observation,
    )  # fmt: skip


def draw(heads=1, n=128, dim=64, seed=0):
    return torch.randn(2, heads, n, dim, generator=torch.Generator().manual_seed(seed)).unbind()


def errors(method, keys, values, mass=None):
    """Squared error of keys and of values over their squares."""
    segment = method.encode(tokens_of(keys, values, mass))
    decoded = [torch.stack(x) for x in zip(*segment.decode(torch.float32), strict=True)]
    return [float((x - y).square().sum() / x.square().sum()) for x, y in zip((keys, values), decoded, strict=True)]


# GEAR


def test_gear_without_its_parts_is_the_backbone():
    keys, values = draw(n=4096)
    bare = GEAR(outliers=0, rank=1)
    parts = bare.encode(tokens_of(keys, values)).heads[0]
    for packed, x in (
        (parts.keys, keys[0].unflatten(0, (-1, 64)).transpose(1, 2)),
        (parts.values, values[0].unflatten(0, (-1, 64))),
    ):
        assert float((packed.decode() - x).square().mean()) == pytest.approx(0.203, rel=0.05)


@pytest.mark.parametrize("bits", [2, 4])
def test_gear_with_everything_is_exact(bits):
    keys, values = draw(n=64, dim=32)
    assert max(errors(GEAR(bits=bits, outliers=1.0), keys, values)) < 1e-5
    assert max(errors(GEAR(bits=bits, buffer_rank=32, iterations=5), keys, values)) < 1e-5


def test_gear_errs_less_with_rank_and_with_outliers():
    keys, values = draw(n=256)
    mass = torch.ones(1, 256)
    by_rank = [errors(GEAR(rank=r), keys, values, mass) for r in (1, 4, 16, 64)]
    by_share = [errors(GEAR(outliers=s), keys, values, mass) for s in (0.0, 0.02, 0.2)]
    for series in (by_rank, by_share):
        for less, more in zip(series, series[1:], strict=False):
            assert more[0] < less[0]
            assert more[1] < less[1]


def test_low_rank_is_a_projection():
    error = torch.randn(100, 40, generator=torch.Generator().manual_seed(0))
    part = low_rank(error, 4, 3).matrix(torch.float32)
    assert float(error.square().sum()) == pytest.approx(
        float(part.square().sum() + (error - part).square().sum()), rel=1e-3
    )
    best = torch.linalg.svdvals(error)[4:].square().sum()
    assert float(best) <= float((error - part).square().sum()) <= 1.3 * float(best)
    exact = low_rank(error, 40, 3).matrix(torch.float32)
    torch.testing.assert_close(exact, error, atol=5e-3, rtol=0)


def test_outliers_are_the_ends_of_each_row():
    matrix = torch.tensor([[5.0, -9.0, 0.0, 1.0], [0.0, 1.0, 3.0, 2.0]])
    assert outlier_columns(matrix, 0.5).tolist() == [[1, 0], [0, 2]]
    assert outlier_columns(matrix, 0.0).shape == (2, 0)


def test_equal_numbers_are_at_one_end_only():
    assert sorted(outlier_columns(torch.full((1, 6), 2.0), 1.0)[0].tolist()) == list(range(6))


def test_gear_holds_the_bytes_of_its_formula():
    n, dim, rank, share = 4096, 128, 4, 0.02
    keys, values = draw(n=n, dim=dim)
    segment = GEAR(rank=rank, outliers=share).encode(tokens_of(keys, values, torch.ones(1, n)))
    backbone = 2 * (2 + 32 / 64)
    factors = 2 * 16 * rank * (n + dim) / (n * dim)
    outliers = 2 * round(share / 2 * n) / n * 32 + 2 * round(share / 2 * dim) / dim * 24
    assert held_bytes(segment) * 8 / (n * dim) == pytest.approx(backbone + factors + outliers, rel=1e-6)


# VidKV


@pytest.mark.parametrize("size", [1, 2, 5, 32, 40])
def test_the_spectrum_of_real_numbers_goes_back(size):
    forward, back = fourier(size)
    assert forward.shape == (size, size)
    torch.testing.assert_close(forward @ back, torch.eye(size), atol=1e-6, rtol=0)
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    spectrum = torch.fft.rfft(x)
    torch.testing.assert_close((x @ forward)[:, : size // 2 + 1], spectrum.real, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("key_bits", "key_cost"), [(1.0, 1.5), (1.5, 2.25), (2.0, 3.0)])
def test_vidkv_holds_the_bytes_of_its_formula(key_bits, key_cost):
    n, dim = 1024, 128
    keys, values = draw(n=n, dim=dim)
    segment = VidKV(key_bits=key_bits).encode(tokens_of(keys, values))
    head = segment.heads[0]
    assert (head.wide is None) == (key_bits == 1)
    assert (head.spectrum is None) == (key_bits == 2)
    # 13 bytes hold the 64 ternary codes of a channel
    assert (held_bytes(segment) - 2 * dim) * 8 / (n * dim) == pytest.approx(key_cost + 13 / 8 + 0.5)


def test_vidkv_gives_two_bits_to_the_widest_channels():
    keys, values = draw(n=64)
    keys[:, :, 3::2] *= 5
    order = VidKV().encode(tokens_of(keys, values)).heads[0].order
    assert all(channel % 2 for channel in order[:31].tolist())


def test_vidkv_scales_and_flushes():
    keys, values = draw(n=128)
    ((k, v),) = VidKV().encode(tokens_of(keys, values)).decode(torch.float32)
    ((k8, v8),) = VidKV().encode(tokens_of(8 * keys, 8 * values)).decode(torch.float32)
    torch.testing.assert_close(k8, 8 * k, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(v8, 8 * v, rtol=1e-5, atol=1e-5)
    ((_, first),) = VidKV().encode(tokens_of(keys[:, :64], values[:, :64])).decode(torch.float32)
    assert torch.equal(first, v[:64])
    assert max(errors(VidKV(), keys, values)) < 0.4


def test_vidkv_protects_the_image_tokens_that_the_text_asks_for():
    n = 320
    keys, values = draw(n=n)
    image = torch.arange(n) < 300
    hidden = torch.randn(n, 16, generator=torch.Generator().manual_seed(1)) / 10
    asked = torch.arange(5, 300, 4)[:64]
    hidden[asked, 0] += 3
    hidden[~image, 0] += 2
    head = VidKVSTP(salient=0.25).encode(tokens_of(keys, values, image_mask=image, hidden_states=hidden)).heads[0]
    (chosen,) = unpack_kept(head.fine.chosen)
    assert torch.equal(chosen, asked)  # 75 rounded down
    plain = VidKV().encode(tokens_of(keys, values)).heads[0]
    (k, v), (k1, v1) = head.decode(torch.float32), plain.decode(torch.float32)
    assert torch.equal(k, k1)
    rest = torch.ones(n, dtype=torch.bool)
    rest[asked] = False
    error, error1 = ((v - values[0]) ** 2).mean(1), ((v1 - values[0]) ** 2).mean(1)
    assert float(error[asked].mean()) < 0.7 * float(error1[asked].mean())
    assert float(error[rest].mean()) == pytest.approx(float(error1[rest].mean()), rel=0.1)
    cost = held_bytes(head) - held_bytes(plain)
    assert cost == 64 * 64 * (2 - 13 / 8) / 8 + 2 * 2 * 64 + n / 8  # codes, minima and the bitmap


@pytest.mark.parametrize(
    ("salient", "images", "fine"),
    [(0.2, 63, 0), (0.2, 64, 64), (0.5, 256, 128), (1.0, 256, 256), (0.0, 256, 0), (0.2, 0, 0)],
)
def test_vidkv_protects_whole_chunks(salient, images, fine):
    keys, values = draw(n=256)
    tokens = tokens_of(keys, values, image_mask=torch.arange(256) < images, hidden_states=torch.randn(256, 8))
    head = VidKVSTP(salient=salient).encode(tokens).heads[0]
    assert (0 if head.fine is None else head.fine.codes.num_matrices * 64) == fine
    assert (head.values is None) == (fine == 256)
    k, v = head.decode(torch.float32)
    assert k.isfinite().all()
    assert v.isfinite().all()
    weights = torch.rand(3, 256)
    torch.testing.assert_close(head.mix(weights), weights @ v, atol=1e-3, rtol=1e-3)


# ZipCache


def test_normalized_attention_of_uniform_queries():
    n = 50
    mass = torch.tril(torch.ones(n, n) / torch.arange(1, n + 1)[:, None]).sum(0)  # [S]
    harmonic = [sum(1 / i for i in range(1, m + 1)) for m in range(n + 1)]
    expected = [(harmonic[n] - harmonic[j]) / (n - j) for j in range(n)]
    found = normalized_attention(torch.stack([mass] * 6), 2)
    assert found.shape == (2, n)
    torch.testing.assert_close(found[0] / 3, torch.tensor(expected), rtol=1e-5, atol=0)


def test_zipcache_is_finer_where_attention_went():
    keys, values = draw(n=200)
    seen_by = torch.arange(200, 0, -1)
    mass = (torch.arange(200) % 2 * seen_by).float()[None]  # every other token
    segment = ZipCache(salient=0.5).encode(tokens_of(keys, values, mass))
    ((k, v),) = segment.decode(torch.float32)
    for x, y in ((keys[0], k), (values[0], v)):
        error = (x - y).square().mean(1)
        assert float(error[1::2].mean()) < 0.1 * float(error[::2].mean())


@pytest.mark.parametrize(("salient", "bits"), [(1.0, 4), (0.0, 2)])
def test_zipcache_at_an_end_has_one_precision(salient, bits):
    keys, values = draw(n=130)
    mass = torch.rand(1, 130, generator=torch.Generator().manual_seed(1))
    mixed = errors(ZipCache(salient=salient), keys, values, mass)
    assert mixed == errors(ZipCache(bits=bits), keys, values)
    assert all(math.isfinite(x) for x in mixed)


def test_zipcache_holds_the_bytes_of_its_formula():
    n, dim = 1280, 128  # sets of whole runs of 64
    keys, values = draw(n=n, dim=dim)
    segment = ZipCache().encode(tokens_of(keys, values, torch.rand(1, n, generator=torch.Generator().manual_seed(1))))
    channels = 2 * 2 * 2 * dim + 2 * dim
    assert held_bytes(segment) == 2 * n * dim * (0.6 * 4 + 0.4 * 2) / 8 + 4 * n + n / 8 + channels


def test_zipcache_takes_dead_channels():
    keys, values = draw(n=70)
    keys[..., 5], values[..., 5] = 0, 0
    assert max(errors(ZipCache(), keys, values)) < 0.02
