"""What methods learn once about a model: the table of `steno train` and `steno calibrate`, one line a method.

Strings only, so that a help text does not wait for torch; `Learner.module` has a function
`learn(lm, text, options) -> tensors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

Command = Literal["train", "calibrate"]


@final
@dataclass(frozen=True)
class Learner:
    """One method that learns.

    steps: of `steno train` where none are given; 0: it takes no steps. reads_text: whether it looks at text, or at random
    tokens; is_long: whether it wants more text than a chapter.
    """

    id: str
    command: Command
    module: str
    what: str
    steps: int = 0
    reads_text: bool = True
    is_long: bool = False


LEARNERS: dict[str, Learner] = {
    learner.id: learner
    for learner in (
        Learner(
            "expected_attention", "calibrate", "steno.learn.expected_attention", "mean and covariance of the queries"
        ),
        Learner("prefixkv", "calibrate", "steno.learn.prefixkv", "how each layer spreads its attention"),
        *(
            Learner(id, "calibrate", "steno.learn.moments", "moments of keys before rotation, and of values")
            for id in ("palu", "cskv", "rotatekv")
        ),
        Learner("kvtc", "calibrate", "steno.learn.kvtc", "how fine each layer must be in a file of some quality"),
        Learner("razorattention", "calibrate", "steno.learn.razorattention", "which heads retrieve", reads_text=False),
        Learner("commvq", "calibrate", "steno.learn.commvq", "codebooks of keys and values", is_long=True),
        Learner(
            "double_sparsity",
            "calibrate",
            "steno.learn.double_sparsity",
            "in which channels queries meet keys",
            is_long=True,
        ),
        Learner("hylra", "calibrate", "steno.learn.hylra", "which layers read what others chose", is_long=True),
        Learner("kvquant", "calibrate", "steno.learn.kvquant", "thresholds of keys, and codebooks", is_long=True),
        Learner("locret", "train", "steno.learn.locret", "retaining heads", steps=120, is_long=True),
        Learner("trim_kv", "train", "steno.learn.trim_kv", "retention gates", steps=120, is_long=True),
    )
}
"""The methods that learn, by id."""
