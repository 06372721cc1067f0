"""What `make results-rows` measures: recipes for every method of the tables, the peers' methods, tasks and lengths.

A method that is new in the tables comes in by itself, in the form of its kind; one that needs another form stands in `FORMS`.
A paper of several stages is measured as a whole, beside the stage that bears its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from steno.bench.peers import PROJECTS
from steno.errors import RecipeError
from steno.methods import COMPOSITIONS, METHODS, NAMED
from steno.models.learned import SHIPPED
from steno.recipe import parse_recipe

MODEL, DTYPE, SEED = "smollm2-135m", "bfloat16", 0
BUDGETS = ("50%", "25%", "12.5%")
MIDDLE = "25%"
"""The budget at which every task is measured."""
CONTEXTS = (512, 1024)
NEEDLES = {"niah": 3, "niah_single_1": 2, "niah_multivalue": 2, "niah_multiquery": 2, "questions": 2}
"""Tasks with right answers, and their instances at each length; the last three ask for four or five values each."""
TEXT = {"perplexity": 2}
TASKS = NEEDLES | TEXT
AT_ALL_BUDGETS = ("niah", "perplexity")
"""Tasks that are measured at the other budgets too."""

AT_BYTES = "kvzip | one_threshold(unit=64) | {id} @ {budget} of bytes"
BY_KIND = {
    "propagate": ("{id} | snapkv @ {budget}",),
    "score": ("{id} @ {budget}",),
    "allocate": ("snapkv | {id} @ {budget}",),
    "merge": ("snapkv | {id} @ {budget}",),
    "transform": ("{id} | int4", "kvzip | one_threshold(unit=64) | {id} | int4 @ {budget} of bytes"),
    "share": ("{id}", "kvzip | {id} @ {budget} of bytes"),
    "quantize": ("{id}", AT_BYTES),
    "access": ("{id}", AT_BYTES),
}
"""The recipes that show a method of each kind: what chooses among scores stands behind snapkv, a basis before int4, and what
has a size of its own alone, then behind the choice that makes it as small as the budget."""
FORMS = {
    "uniform": (),  # the default
    "evict": (),  # the default
    "all": (),  # the default
    "adakv": ("kvzip | adakv @ {budget}", "snapkv | adakv @ {budget}"),
    "one_threshold": ("kvzip | one_threshold @ {budget}", "snapkv | one_threshold @ {budget}"),
    "kivi": ("kivi(bits=4)", "kivi(bits=2)", "kvzip | adakv | kivi(bits=4) @ {budget}", AT_BYTES),
}
"""Methods whose form is another one, or several, or none."""
WHOLE_PAPER = "{id} @ {budget}"


RECIPE = "recipe"
"""What kind a paper of several stages is of, in lists of methods."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A recipe or a peer's method. budget: of `BUDGETS`, None where it takes none. shows: kind and id of the method."""

    text: str
    budget: str | None
    is_peer: bool
    shows: tuple[str, str] | None = None

    @property
    def of_bytes(self) -> bool:
        """Whether the budget is a share of the bytes instead of the tokens."""
        return self.text.endswith("% of bytes")

    @property
    def form(self) -> str:
        """The text without its budget."""
        return self.text if self.budget is None else self.text.rpartition("@")[0].rstrip()


def entries() -> tuple[list[Entry], dict[str, str]]:
    """Everything that is measured, and why a method of the tables is not."""
    found = [Entry(text="full", budget=None, is_peer=False)]
    left_out: dict[str, str] = {}
    for name, method in METHODS.items():
        if method.trained and not any(SHIPPED.glob(f"{name}-*.safetensors")):
            left_out[name] = "it needs weights that are trained for the model first"
            continue
        for form in FORMS.get(name, BY_KIND[method.kind]):
            try:
                found += _at_budgets(form, (method.kind, name))
            except RecipeError as error:
                left_out[name] = f"`{form}` is no recipe: {error}"
    for name in [*NAMED, *COMPOSITIONS]:
        found += _at_budgets(WHOLE_PAPER, (RECIPE, name))
    return found + list(_peers()), left_out


def _at_budgets(form: str, shows: tuple[str, str]) -> list[Entry]:
    """A form at each budget, if it takes one, each checked to be a recipe."""
    budgets: tuple[str | None, ...] = BUDGETS if "{budget}" in form else (None,)
    texts = [(str(parse_recipe(form.format(id=shows[1], budget=budget))), budget) for budget in budgets]
    return [Entry(text=text, budget=budget, is_peer=False, shows=shows) for text, budget in texts]


def _peers() -> Iterator[Entry]:
    for name, project in PROJECTS.items():
        for method in project.methods:
            for budget in BUDGETS if project.takes_share else (None,):
                text = f"{name}:{method}" + (f"@{budget}" if budget else "")
                yield Entry(text=text, budget=budget, is_peer=True)


def wanted(task: str) -> list[Entry]:
    """What is measured on a task: shares of the bytes on those of all budgets alone."""
    known = entries()[0]
    return known if task in AT_ALL_BUDGETS else [e for e in known if e.budget in (None, MIDDLE) and not e.of_bytes]
