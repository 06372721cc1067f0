"""Whole numbers from shares."""

from __future__ import annotations

from collections.abc import Sequence


def largest_remainder(shares: Sequence[float], room: Sequence[int], total: int) -> list[int]:
    """Whole numbers near `shares`, each at most its `room`, that sum to `total` or to all room: largest remainder, then first."""
    counts = [min(int(share), space) for share, space in zip(shares, room, strict=True)]
    while (left := min(total, sum(room)) - sum(counts)) > 0:
        open_places = [place for place, space in enumerate(room) if counts[place] < space]
        open_places.sort(key=lambda place: counts[place] - shares[place])
        for place in open_places[:left]:
            counts[place] += 1
    return counts
