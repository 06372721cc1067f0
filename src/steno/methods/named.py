"""Papers that are several stages at once: the method that bears the name, and the stages that its paper has beside it.

`ems @ 25%`, a name and a budget alone, is the whole paper; in a chain, `snapkv | ems @ 25%`, the name is the stage. Papers that
are one stage need no entry: their name alone is the whole paper already, as `gear` (backbone, low rank and outliers),
`zipcache` (saliency and both precisions) and `cskv` (both branches; its codes in 4 bits are `cskv | int4`). Recipes of our
own have a name too, and stand alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, cast, final

from steno.methods.allocate.ems_heads import EMSHeads
from steno.methods.allocate.one_threshold import OneThreshold
from steno.methods.interfaces import Method
from steno.methods.merge.razor_compensation import RazorCompensation
from steno.methods.propagate.zipvl_attention import ZipVLAttention
from steno.methods.quantize.integer import Int4
from steno.methods.score.global_local import GlobalLocal
from steno.methods.score.heavy_hitters import HeavyHitters
from steno.methods.score.kvzip import KVzip
from steno.methods.score.recency import Recency
from steno.methods.score.snapkv import SnapKV
from steno.methods.score.text_prior import TextPrior
from steno.methods.transform.hadamard import Hadamard
from steno.types import PAGE_TOKENS


@final
@dataclass(frozen=True, kw_only=True)
class NamedRecipe:
    """The stages beside the one that bears the name `id`, in the order of the kinds, and what differs from the paper."""

    id: str
    beside: tuple[Method, ...]
    differs: str


NAMED: dict[str, NamedRecipe] = {
    recipe.id: recipe
    for recipe in (
        NamedRecipe(
            id="ems",
            beside=(GlobalLocal(), EMSHeads()),
            differs="A reconstruction from the abstract, not EMS, in all its stages; merged once, at the end of the prompt.",
        ),
        NamedRecipe(
            id="kvmerger",
            beside=(HeavyHitters(recent_share=0.0),),
            differs="The budget says how many neighbours are merged, and a set counts on the logit instead of in its value.",
        ),
        NamedRecipe(
            id="chelsea",
            beside=(Recency(window=64),),
            differs="Chunks, passes and log n on the logits are ours; tokens after the prompt are not clustered.",
        ),
        NamedRecipe(
            id="razorattention",
            beside=(Recency(), RazorCompensation()),
            differs="The buffer follows from the budget; it does not roll while decoding, so later tokens all stay.",
        ),
        NamedRecipe(
            id="zipvl",
            beside=(ZipVLAttention(), HeavyHitters(recent_share=0.0)),
            differs=(
                "The second version, which drops what is not important, reconstructed from the text; probes say which tokens "
                "take part in the prefill, at any budget, and the attention of all that took part says which are kept."
            ),
        ),
        NamedRecipe(
            id="look_m",
            beside=(TextPrior(),),
            differs=(
                "As in the paper the budget holds, where the authors' code keeps all text; a prompt without images is "
                "compressed too."
            ),
        ),
        NamedRecipe(
            id="fastkv",
            beside=(SnapKV(window=8, kernel=7, pool="max"),),
            differs=(
                "Every layer keeps the budget of what passes it, the paper's mode proportional; layers behind the choice see a "
                "share of the prompt at any budget: with fastkv(share=1) all. Scores are pooled after the mean over the query "
                "heads of a KV head, not before."
            ),
        ),
    )
}


@final
@dataclass(frozen=True, kw_only=True)
class Composition:
    """A recipe of our own: a name for all its stages, in the order of the kinds, which stands alone before a budget."""

    id: str
    stages: tuple[Method, ...]
    year: int
    differs: str


COMPOSITIONS: dict[str, Composition] = {
    recipe.id: recipe
    for recipe in (
        Composition(
            id="shorthand",
            stages=(KVzip(window=96), OneThreshold(unit=PAGE_TOKENS), Hadamard(), Int4()),
            year=2026,
            differs=(
                "Found by measuring compositions at an eighth of the bytes (`benchmarks/eighth.py`): scores by KVzip, one "
                "threshold for the whole model, whole pages, 4 bits in a rotated basis."
            ),
        ),
    )
}


def stage_text(stage: Method) -> str:
    """`name` or `name(argument=value)`, default values left out."""
    values = [(f.name, getattr(stage, f.name), f.default) for f in fields(cast(Any, stage))]
    given = [f"{name}={value!r}" for name, value, default in values if value != default]
    return f"{stage.id}({', '.join(given)})" if given else stage.id
