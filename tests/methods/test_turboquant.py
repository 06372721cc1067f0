"""TurboQuant: the rotation, the error on any input, and attention in the rotated basis."""

import pytest
import torch

from steno.methods.quantize.turboquant import TurboQuant, rotate, rotation
from steno.types import KeptTokens


def kept(keys, values):
    positions = [torch.arange(len(k)) for k in keys]
    return KeptTokens(keys=list(keys), values=list(values), positions=positions, layer_idx=0, num_layers=1)


@pytest.mark.parametrize("dim", [1, 20, 64, 80, 128])
def test_rotation_is_orthogonal_and_the_same(dim):
    matrix = rotation(dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), atol=1e-5, rtol=0)
    rotation.cache_clear()
    assert torch.equal(rotation(dim), matrix)
    x = torch.randn(7, dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(rotate(x), back=True), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.363), (2, 0.1175), (4, 0.0095)])
@pytest.mark.parametrize("kind", ["gaussian", "one channel", "two channels"])
def test_error_is_that_of_the_codebook_on_any_input(bits, error, kind):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1024, 128, generator=g)
    if kind != "gaussian":  # nothing but outliers
        x = torch.eye(128)[torch.arange(1024) % 128][None] * 30.0
    if kind == "two channels":
        x = x + x.roll(17, 1)
    for decoded, _ in TurboQuant(bits=bits).encode(kept(x, x)).decode(torch.float32):
        assert float((decoded - x[0]).square().sum() / x.square().sum()) == pytest.approx(error, rel=0.08)


def test_scaling_a_vector_scales_what_is_decoded():
    x = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1))
    once, thrice = (TurboQuant().encode(kept(f * x, x)).decode(torch.float32)[0][0] for f in (1.0, 3.0))
    torch.testing.assert_close(thrice, 3 * once, rtol=2**-10, atol=1e-4)


def test_norm_correction_keeps_lengths():
    x = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1))
    ((decoded, _),) = TurboQuant(bits=2, norm_correction=True).encode(kept(x, x)).decode(torch.float32)
    torch.testing.assert_close(decoded.norm(dim=1), x[0].norm(dim=1), rtol=2**-10, atol=0)
