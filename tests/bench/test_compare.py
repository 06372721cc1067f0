"""The guard sees what changed beyond the intervals, and nothing else."""

from __future__ import annotations

import pytest
from example_rows import COUNT, example_row, example_rows

from steno.bench.compare import compare

RECIPE = "kvzip | adakv | kivi(bits=4) @ 50%"
GOOD = [1.0] * (COUNT - 1) + [0.0]
BAD = [1.0] * (COUNT // 2) + [0.0] * (COUNT // 2)


def changes(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """`what` of each change with + or -."""
    old, new = (example_row(RECIPE, "niah", 1024, **{"scores": GOOD, **fields}) for fields in (before, after))
    found = compare([new], [old])
    assert found.num_compared == 1
    back = compare([old], [new])
    assert [(c.what, c.better) for c in back.changes] == [(c.what, not c.better) for c in found.changes]
    return [f"{'+' if change.better else '-'}{change.what}" for change in found.changes]


def test_the_same_rows_do_not_differ() -> None:
    found = compare(example_rows(), example_rows())
    assert (found.changes, found.num_compared, found.num_paired, found.missing) == ((), 12, 12, ())
    assert not found.is_regression


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {"scores": BAD}, ["-score"]),
        ({}, {"scores": [1.0] * (COUNT - 2) + [0.0, 0.0]}, []),
        (
            {"scores": [0.5 + i / 100 for i in range(COUNT)]},
            {"scores": [0.48 + i / 100 for i in range(COUNT)]},
            ["-score"],
        ),
        ({"kls": [0.1] * COUNT, "kl": 0.1}, {"kls": [0.2] * COUNT, "kl": 0.2}, ["-KL"]),
        ({"kls": [0.1] * COUNT, "kl": 0.1}, {"kls": [0.1005] * COUNT, "kl": 0.1005}, []),
        ({"kls": [0.0, 0.2] * 10, "kl": 0.1}, {"kls": [0.3, 0.0] * 10, "kl": 0.15}, []),
        ({"kv_bytes": 1000}, {"kv_bytes": 1011}, ["-bytes held"]),
        ({"kv_bytes": 1000}, {"kv_bytes": 1009}, []),
        ({"kv_bytes_peak": 1000}, {"kv_bytes_peak": 900}, ["+peak bytes"]),
        ({}, {"prefill_s": 9.0, "prefill_s_quartiles": [8.0, 10.0]}, ["-prefill"]),
        ({}, {"prefill_s": 9.0, "prefill_s_quartiles": [0.1, 10.0]}, []),
        ({}, {"prefill_s": 9.0, "prefill_s_quartiles": [8.0, 10.0], "host": "another"}, []),
        ({}, {"decode_ms_per_token": 2.0, "decode_ms_per_token_quartiles": [1.0, 3.0]}, ["+decoding"]),
    ],
)
def test_what_is_a_change(before: dict[str, object], after: dict[str, object], expected: list[str]) -> None:
    assert changes(before, after) == expected


def test_other_instances_are_compared_by_their_intervals() -> None:
    old = example_row(RECIPE, "niah", 1024, scores=GOOD)
    for scores, expected in ((BAD, ["score"]), ([1.0] * 15 + [0.0] * 5, [])):
        found = compare([example_row(RECIPE, "niah", 1024, scores=scores, instances="other")], [old])
        assert (found.num_compared, found.num_paired) == (1, 0)
        assert [change.what for change in found.changes] == expected


def test_time_alone_is_no_regression() -> None:
    old = example_row(RECIPE, "niah", 1024)
    slower = example_row(RECIPE, "niah", 1024, prefill_s=9.0, prefill_s_quartiles=[8.0, 10.0])
    found = compare([slower], [old])
    assert len(found.changes) == 1
    assert not found.is_regression
    assert compare([example_row(RECIPE, "niah", 1024, kv_bytes=10**9)], [old]).is_regression


def test_cells_and_models_that_only_one_side_has() -> None:
    rows = example_rows()
    assert compare(rows[1:], rows).missing == (rows[0],)
    other = example_row(RECIPE, "niah", 1024, model_hash="f" * 16)
    assert (compare([other], rows).num_compared, len(compare([other], rows).missing)) == (0, 12)


def test_a_change_names_its_cell() -> None:
    old, new = (example_row(RECIPE, "niah", 1024, scores=scores) for scores in (GOOD, BAD))
    [change] = compare([new], [old]).changes
    assert str(change).startswith(
        f"worse  niah, 1024 tokens, question unseen, {RECIPE}: score 0.950 to 0.500 (-0.450, "
    )
