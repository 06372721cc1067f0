"""What a learner is told beside the model and the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final


@final
@dataclass(frozen=True, kw_only=True)
class Options:
    """seed: of every draw. steps: of training. identity: what a checkpoint must be of, to go on from it.

    checkpoint: file to go on from and to save to; None: none. progress: called with (what is done, steps done, steps in all).
    """

    seed: int = 0
    steps: int = 0
    identity: str = ""
    checkpoint: Path | None = None
    progress: Callable[[str, int, int], None] | None = None

    def report(self, what: str, done: int, total: int) -> None:
        """Tells how far it is, if anybody listens."""
        if self.progress is not None:
            self.progress(what, done, total)
