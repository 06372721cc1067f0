"""Quest: its bounds bound, and are tight where they can be."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steno.methods.access.quest import Quest


@given(seed=st.integers(0, 200), hkv=st.integers(1, 3), group=st.integers(1, 4), dim=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_bounds_hold_for_every_token_of_a_page(seed: int, hkv: int, group: int, dim: int) -> None:
    g = torch.Generator().manual_seed(seed)
    queries, pages = (
        torch.randn(hkv * group, dim, generator=g),
        torch.randn(hkv, 3, 5, dim, generator=g),
    )  # [Hkv, P, 5, D]
    bounds = Quest().page_bounds(queries, pages.amin(2), pages.amax(2))
    for head in range(hkv):
        for page in range(3):
            rows = queries[head * group : (head + 1) * group]
            loop = max(
                sum(max(float(q[d] * k[:, d].min()), float(q[d] * k[:, d].max())) for d in range(dim))
                for q in rows
                for k in [pages[head, page]]
            )
            assert abs(bounds[head, page].item() - loop) < 1e-4
            assert bounds[head, page] >= (rows @ pages[head, page].T).max() - 1e-4


def test_bound_is_tight_on_identical_keys() -> None:
    key, queries = torch.randn(1, 1, 8), torch.randn(3, 8)
    assert torch.allclose(Quest().bounds(queries, key[0], key[0]), (queries @ key[0, 0]).max()[None], atol=1e-5)


def test_num_pages() -> None:
    assert Quest(tokens=1024).num_pages(100_000) == 16
    assert Quest(tokens=64).num_pages(100_000) == 3
    assert Quest(tokens=1024).num_pages(65) == 2
