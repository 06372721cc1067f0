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
    tokens.
    """

    id: str
    command: Command
    module: str
    what: str
    steps: int = 0
    reads_text: bool = True


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
        Learner("locret", "train", "steno.learn.locret", "retaining heads", steps=120),
        Learner("trim_kv", "train", "steno.learn.trim_kv", "retention gates", steps=120),
    )
}
"""The methods that learn, by id."""
