"""Which methods can stand in one recipe, found by trying, and the page that says so.

`python tests/composition.py` writes docs/methods.md anew between its markers.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import steno
from steno.calibration import save_calibration
from steno.context import Context
from steno.errors import BudgetError, RecipeError
from steno.methods import KINDS, METHODS, TRANSFORMS, Method, describe_methods
from steno.pipeline import with_weights
from steno.recipe import parse_recipe
from steno.session import LanguageModel
from steno.types import Need
from tiny import prompt, save_with_bytes
from tiny_vlm import build, inputs, show

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
PROMPT_TOKENS, PROMPT_IMAGES, BUDGET_TOKENS, NEW_TOKENS = 204, 10, 140, 3
"""More than two pages of 64 are kept, of image tokens alone more than one, more than a page is dropped or merged in all, and
what is kept is no multiple of a page."""
CHOOSES = "keydiff"
"""The scorer of pairs that need one and have none."""
ARGUMENTS = {
    "snapkv": "window=16",
    "quest": "tokens=64, dense_layers=0",
    "palu": "key_share=0.25, value_share=0.25",
    "cskv": "key_density=0.25, value_density=0.25",
    "videollm_mod": "share=0.7, router='{learned}/videollm_mod.safetensors'",
}
"""Arguments under which a method does something with so short a prompt, and leaves widths other than a head's: half of two
heads would be as wide as one. `{learned}` stands for that folder of `Tiny`."""

Pair = tuple[type[Method], type[Method]]


def pairs() -> list[Pair]:
    """All pairs of methods of different kinds in the order of a recipe, and of transforms in any, also one twice."""
    ordered = sorted(METHODS.values(), key=lambda cls: KINDS.index(cls.kind))
    return [(a, b) for a, b in combinations(ordered, 2) if a.kind != b.kind] + list(
        product(TRANSFORMS.values(), repeat=2)
    )


def recipe_of(pair: Pair) -> str:
    """The text of a recipe with these two, and a scorer where one of them needs it."""
    names = [f"{cls.id}({ARGUMENTS[cls.id]})" if cls.id in ARGUMENTS else cls.id for cls in pair]
    kinds = {cls.kind for cls in pair}
    if "score" not in kinds and kinds & {"allocate", "merge"}:
        at = int("propagate" in kinds)  # these come first
        names, kinds = [*names[:at], CHOOSES, *names[at:]], kinds | {"score"}
    return " | ".join(names) + (f" @ {BUDGET_TOKENS}" if "score" in kinds else "")


LEARNED: dict[str, dict[str, tuple[int, ...]]] = {
    "locret": {"w1": (3, 6, 96), "w2": (3, 2, 6)},
    "trim_kv": {"w1": (3, 6, 48), "b1": (3, 6), "w2": (3, 2, 6), "bias": (3, 2)},
    "prefixkv": {"curves": (3, 101)},
    "commvq": {"key_centres": (3, 2, 2, 64, 12), "value_rows_2": (3, 2, 25, 12), "value_rows_1": (3, 2, 13, 12)},
    "razorattention": {"induction": (3, 2), "echo": (3, 2)},
    "videollm_mod": {"router": (3, 48)},
}
"""What methods learn of a tiny model: 3 layers, 2 KV heads of 2 query heads, 12 dimensions each."""


class Host(NamedTuple):
    """A tiny model as the session knows it, and the tokens of a prompt for it."""

    lm: LanguageModel
    tokens: list[int]


class Tiny(NamedTuple):
    """Where recipes are tried: on a language model, and those that look at images on one that sees some in its prompt.

    learned: the folder of what methods learned of models of this shape, which is the same of both.
    """

    plain: Host
    seeing: Host
    learned: Path


def tiny_language_model(folder: Path) -> tuple[Any, Path]:
    """Three layers of random weights with a tokenizer, as the session knows them; in the folder also what methods learned."""
    g = torch.Generator().manual_seed(0)
    for name, shapes in LEARNED.items():
        tensors = {key: torch.randn(*shape, generator=g) for key, shape in shapes.items()}
        save_calibration(folder / f"{name}.safetensors", tensors, {})
    # the first layer reads everything, the second chooses, the third does as the second
    save_calibration(folder / "hylra.safetensors", {"source_layer": torch.tensor([-1.0, 1.0, 1.0])}, {})
    return steno.load(save_with_bytes(folder / "llama", "llama"), dtype="fp32"), folder


def tiny_models(folder: Path) -> Tiny:
    """The tiny language model and a llava around the like of it, with the same tokenizer."""
    lm, learned = tiny_language_model(folder)
    given = inputs("llava", images=PROMPT_IMAGES)
    model = build("llava", vocab_size=len(lm.tokenizer))
    show(model, given["pixel_values"])
    return Tiny(
        plain=Host(lm, prompt(PROMPT_TOKENS)[0].tolist()),
        seeing=Host(LanguageModel(replace(lm.loaded, model=model, name="llava")), given["input_ids"][0].tolist()),
        learned=learned,
    )


def read(tiny: Tiny, text: str) -> Context:
    """The prompt as a recipe keeps it, of the model that it is tried on."""
    recipe = parse_recipe(text.format(learned=tiny.learned))
    recipe = with_weights(recipe, lambda name, command: str(tiny.learned / f"{name}.safetensors"))
    lm, tokens = tiny.seeing if Need.IMAGE_MASK in recipe.needs else tiny.plain
    return lm.read_tokens(tokens, recipe)


def refusal(tiny: Tiny, text: str) -> str:
    """Why a recipe cannot be, in its own words, or nothing if it reads, decodes with finite output and keeps its invariants."""
    try:
        ctx = read(tiny, text)
    except BudgetError:
        raise  # the budget is large enough for every method
    except RecipeError as error:
        return str(error)
    answer = ctx.go_on([7], max_new_tokens=NEW_TOKENS, keep_logprobs=True)
    logprobs = torch.cat([step.logprobs for step in answer if step.logprobs is not None])
    assert logprobs.shape[0] == NEW_TOKENS, text
    assert torch.isfinite(logprobs).all(), text
    for cache in (ctx.cache, answer.cache):
        cache.check_integrity()
    return ""


def compositions(refused: dict[Pair, str]) -> str:
    """The table of what goes with what, and the reasons where something does not."""
    head = ["", *KINDS]
    lines = [head, ["---"] * len(head)]
    for cls in sorted(METHODS.values(), key=lambda cls: KINDS.index(cls.kind)):
        lines.append([f"`{cls.id}`", *(_partners(cls, kind, refused) for kind in KINDS)])
    reasons: dict[str, list[Pair]] = {}
    for (a, b), text in refused.items():
        general = re.sub(rf"\b{b.id}\b", "Y", re.sub(rf"\b{a.id}\b", "X", text))
        reasons.setdefault(general, []).append((a, b))
    said = [f"- {_who(found)}: {text}" for text, found in reasons.items()]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", *said])


def _who(found: Sequence[Pair]) -> str:
    """`a` `b` with `c` `d` where each of the first goes with none of the others, else pair by pair."""
    first, second = (list(dict.fromkeys(pair[i].id for pair in found)) for i in (0, 1))
    if len(found) == len(first) * len(second):
        return f"{_names(first)} with {_names(second)}"
    return ", ".join(f"{_names([a.id])} with {_names([b.id])}" for a, b in found)


def _partners(cls: type[Method], kind: str, refused: dict[Pair, str]) -> str:
    """Which methods of a kind go with a method; of transforms, which may stand behind it."""
    mine = [pair for pair in pairs() if cls in pair and (pair[0] is cls or pair[0].kind != cls.kind)]
    tried = [(pair[pair[0] is cls], bool(refused.get(pair))) for pair in mine]
    tried = [(other, fails) for other, fails in tried if other.kind == kind]
    fails = [other.id for other, failed in tried if failed]
    if not tried:
        return ""
    if not fails:
        return "all"
    works = [other.id for other, failed in tried if not failed]
    if not works:
        return "none"
    return f"only {_names(works)}" if len(works) < len(fails) else f"all but {_names(fails)}"


def _names(ids: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in ids)


def methods_table() -> str:
    """A row for each method and named recipe, as it describes itself."""
    lines = [["kind", "name", "what", "paper", "sees", "frees memory", "trained", "differs"]]
    lines.append(["---"] * len(lines[0]))
    for row in describe_methods():
        paper = f"[{row['paper']}](https://arxiv.org/abs/{row['arxiv']})" if row["arxiv"] else row["paper"]
        what = f"`{row['title']}`" if row["kind"] == "recipe" else row["title"]
        sees = ", ".join(need.lower().replace("_", " ") for need in row["needs"]) or "keys and values"
        yes = ["yes" if row[name] else "no" for name in ("frees_memory", "trained")]
        lines.append([row["kind"], f"`{row['id']}`", what, f"{paper}, {row['year']}", sees, *yes, row["differs"]])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def with_part(page: str, name: str, text: str) -> str:
    """The page with `text` between `<!-- name -->` and `<!-- /name -->`."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def refusals(tiny: Tiny, some: Sequence[Pair]) -> dict[Pair, str]:
    """The reason of each pair that cannot be in one recipe."""
    return {pair: reason for pair in some if (reason := refusal(tiny, recipe_of(pair)))}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        refused = refusals(tiny_models(Path(folder)), pairs())
    page = with_part(PAGE.read_text(encoding="utf-8"), "methods", methods_table())
    PAGE.write_text(with_part(page, "compositions", compositions(refused)), encoding="utf-8")


if __name__ == "__main__":
    main()
