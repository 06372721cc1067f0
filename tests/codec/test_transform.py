"""Levels of quality: errors follow the step, refinements nest, what has no structure gets no basis."""

from __future__ import annotations

import pytest
import torch

from steno.codec import transform
from steno.codec.rotation import Rotation
from steno.codec.transform import Moments, Side


def correlated(n: int, channels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator) / torch.arange(1, channels + 1)
    return torch.randn(n, channels, generator=generator) @ mixing.T + 3


def encoded(x: torch.Tensor, directions: torch.Tensor | None, step: float, num_refinements: int = 0) -> transform.Coded:
    side = Side([x])
    mean = torch.cat(Moments.of(side).means)
    return transform.encode(side, mean, directions, step, num_refinements=num_refinements)


def decoded(coded: transform.Coded, count: int) -> torch.Tensor:
    out = torch.full(coded.coarse.shape, torch.nan)
    transform.decode(coded.frame, coded.coarse, coded.recent, coded.refinements[:count], Side([out]))
    return out


@pytest.mark.parametrize("has_basis", [True, False])
@pytest.mark.parametrize("n", [0, 1, 5, 128, 500])
def test_errors_are_below_the_step(has_basis: bool, n: int) -> None:
    x, step = correlated(n, 24), 0.05
    for refinements in (0, 1, 2):
        directions = transform.fit(Moments.of(Side([x])), 1e-4)[1][0] if has_basis else None
        assert n < 500 or (directions is not None) == has_basis
        coded = encoded(x, directions, step, refinements)
        assert len(coded.refinements) == refinements
        for count in range(refinements + 1):
            wanted = step * 3 ** (refinements - count)
            error = decoded(coded, count) - x
            old, new = error[: max(0, n - 128)], error[max(0, n - 128) :]
            if len(old):
                # uniform within a step has a deviation of 0.29; the dead zone and the rounding of the basis add to it
                assert 0.2 * wanted < old.std() < 0.45 * wanted
            if len(new) > 5:
                assert new.std() < 0.2 * wanted


def test_a_number_beyond_eight_bits_makes_its_component_coarser_and_no_other() -> None:
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    x[7, 3] = 500.0
    coded = encoded(x, None, 0.05)
    doubled = coded.frame.scales / coded.frame.scales.min()
    assert doubled.tolist() == [1, 1, 1, 128, 1, 1, 1, 1]
    assert (decoded(coded, 0)[7, 3] - 500).abs() < 128 * 0.05
    others = [i for i in range(8) if i != 3]
    assert (decoded(coded, 0) - x)[:, others].abs().max() < 0.05


def test_a_basis_is_used_where_it_saves_more_than_it_costs() -> None:
    def heads_of_a_basis(heads: list[torch.Tensor]) -> int:
        return transform.fit(Moments.of(Side(heads)), 0.1)[0]

    noise = torch.randn(2, 3000, 16, generator=torch.Generator().manual_seed(0))
    assert heads_of_a_basis(list(noise)) == 0
    assert heads_of_a_basis(list(correlated(3000, 32).reshape(3000, 2, 16).transpose(0, 1))) == 2
    apart = [correlated(3000, 16, seed) for seed in (1, 2)]
    assert heads_of_a_basis(apart) == 1
    assert heads_of_a_basis([x[:20] for x in apart]) == 0
    assert heads_of_a_basis([apart[0], apart[1][:2000]]) == 1


def test_rotation_is_undone_and_done_again() -> None:
    x, rotation = torch.randn(2, 50, 12), Rotation([1.0, 0.3, 0.1, 0.01])
    angles = [rotation.angles(where) for where in (torch.arange(50), torch.arange(50) * 20)]
    there = Side([torch.empty(50, 12) for _ in x], angles)
    there.put(slice(None), torch.cat(list(x), 1))
    assert torch.equal(there.heads[0][:, 8:], x[0, :, 8:])
    assert not torch.allclose(there.heads[1], x[1], atol=0.1)
    torch.testing.assert_close(there.rows(slice(None)), torch.cat(list(x), 1), atol=1e-5, rtol=1e-5)
    part = there.of_tokens(slice(7, 30)).of_heads(1, 1)
    torch.testing.assert_close(part.rows(slice(2, 5)), x[1, 9:12], atol=1e-5, rtol=1e-5)
