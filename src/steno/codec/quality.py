"""The named levels at which a context is stored, and how fine each layer must be for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

from torch import Tensor

from steno.calibration import load_calibration
from steno.errors import BadArgument, CalibrationError, nearest
from steno.models.learned import find_weights

LOSSLESS = "lossless"
STEPS: Mapping[str, float] = MappingProxyType({"q1": 1.6, "q2": 0.75, "q3": 0.35, "q4": 0.17, "q5": 0.085})
"""Of each level the step, in standard deviations of the keys or values of a layer of middling weight. Half a step is about
one bit more."""

MAX_STEP = 1.5
"""No layer gets a larger one: what is lost then is the same for neighbouring tokens, and does not average out."""

QUALITIES = (LOSSLESS, *STEPS)
MAX_REFINEMENTS = 3
CALIBRATION = "kvtc"
"""`steno calibrate` gathers the weights of layers under this name."""


def check_quality(quality: str, refinements: int = 0) -> None:
    """Raises `BadArgument` for a level that there is not, or refinements of one that cannot have them."""
    if quality not in QUALITIES:
        raise BadArgument(f"unknown quality {quality!r}; {nearest(quality, QUALITIES)}")
    if not 0 <= refinements <= MAX_REFINEMENTS or (refinements and quality == LOSSLESS):
        raise BadArgument(
            f"a level from q1 to q5 can be stored with 0 to {MAX_REFINEMENTS} refinements; got {quality!r} and {refinements}."
        )


@final
@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """How much an error of each layer changes what follows: of one standard deviation, in a geometric mean of 1 over layers.

    keys, values: `[L]`; None: nothing is known, and all layers weigh the same.
    """

    keys: Tensor | None = None
    values: Tensor | None = None

    @classmethod
    def of(cls, model_hash: str | None) -> LayerWeights:
        """Those of a model: calibrated by its user, or shipped with steno, or unknown."""
        try:
            path = find_weights(CALIBRATION, model_hash, "calibrate")
        except CalibrationError:
            return cls()
        found = load_calibration(path, ("keys", "values"))
        return cls(keys=found["keys"], values=found["values"])

    def steps(self, quality: str, layer_idx: int, deviations: Sequence[float]) -> tuple[float, float]:
        """The steps of keys and values of a layer. deviations: the standard deviations of both."""
        weights = [1.0 if w is None else float(w[layer_idx]) for w in (self.keys, self.values)]
        relative = [min(STEPS[quality] / w, max(MAX_STEP, STEPS[quality])) for w in weights]
        first, second = (max(r * d, 1e-20) for r, d in zip(relative, deviations, strict=True))
        return first, second
