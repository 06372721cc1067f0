"""What recipes lose at an eighth of the bytes and below: planted numbers, and drift on text that goes on.

Numbers: the samples of `needle.py`, 2,000 tokens of prose, the question not seen by compression. Text: the task `perplexity` of
`steno bench`, 2,000 tokens read and the next 256 forced, 16 at a time; KL of the recipe's distributions from the full cache's,
in nats a token. Each text is read and replayed once, and every recipe compresses what was read, which gives what `read` gives
(tested). So only recipes that see no more than keys, values and the replay can be compared. One JSON line for each text and
recipe, written as they are done; a run with the same file goes on where it stopped, and prints what all lines together say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).resolve().parent
# as in the other scripts: nothing in this folder is to pass for an installed package
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p).resolve() != HERE)]

import torch
from benchmarks import needle
from benchmarks.common import Row, append_row, cpu_name, notice, read_rows, today
from rich.progress import track
from torch import Tensor

import steno
from steno.bench.stats import bootstrap, difference_interval, mean_interval
from steno.bench.tasks.perplexity import Perplexity
from steno.bench.tasks.task import Draw, Room
from steno.cache.layer import LayerCache
from steno.codec.identity import HowRead
from steno.context import Context
from steno.errors import RecipeError
from steno.models.kvcache import KVCache
from steno.recipe import as_recipe
from steno.replay import replay_context
from steno.session import LanguageModel
from steno.types import Need

FULL = "full"
RECIPES = ("kvzip | adakv | int4 @ 37%", "shorthand @ 43%", "shorthand @ 21%")
TOKENS, FOLLOWING, AT_ONCE = 2000, 256, 16


@dataclass(frozen=True, kw_only=True)
class Read:
    """A text that was read once: the layers with their dense prompts, and the replay mass of each."""

    lm: LanguageModel
    tokens: list[int]
    layers: list[LayerCache]
    masses: list[Tensor]

    @classmethod
    def of(cls, lm: LanguageModel, document: str) -> Read:
        tokens, prefix = lm.prompt_tokens(document)
        cache = KVCache(lm.model.config, "kvzip @ 100%", prompt_tokens=len(tokens))
        with torch.inference_mode():
            lm.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        method = cache.recipe.score
        assert isinstance(method, steno.methods.KVzip)
        masses = replay_context(
            lm.model, cache, tokens, num_prefix_tokens=prefix, method=method, tokenizer=lm.tokenizer,
            after=lm.template.after, max_positions=lm.loaded.max_positions,
        )  # fmt: skip
        return cls(lm=lm, tokens=tokens, layers=cache.own_layers, masses=masses)

    def under(self, text: str) -> Context:
        """What `LanguageModel.read` gives for this recipe, without reading again."""
        recipe = as_recipe(text)
        if recipe.needs - {Need.REPLAY}:
            raise RecipeError(f"{text} sees more than keys, values and the replay: use another recipe.")
        cache = KVCache(self.lm.model.config, recipe, prompt_tokens=len(self.tokens))
        for layer, read in zip(cache.own_layers, self.layers, strict=True):
            layer._prompt = copy(read._prompt)
            layer._prompt.policy = layer.policy
            layer.seen, layer.row_seen, layer.token_bytes = read.seen, list(read.row_seen), read.token_bytes
            layer.is_initialized = True
        cache.compress(self.masses)
        return Context(self.lm, cache, self.tokens, how=HowRead())


def number(lm: LanguageModel, index: int, count: int, seed: int) -> tuple[Read, Callable[[Context], Row]]:
    """A text with a planted number, and how well a context answers for it."""
    document, key, value = needle.sample(lm, index, count, TOKENS, seed, "prose")
    question, prefix = needle.QUESTION.format(key=key), needle.ANSWER_PREFIX.format(key=key)

    def measure(context: Context) -> Row:
        answer = "".join(s.text for s in context.ask(question, answer_prefix=prefix, max_new_tokens=16))
        return {"right": value in answer}

    return Read.of(lm, document), measure


def text(lm: LanguageModel, index: int, count: int, seed: int) -> tuple[Read, Callable[[Context], Row]]:
    """A text that goes on, and how far a context drifts from the full cache on it."""
    task, room = Perplexity(continuation_tokens=FOLLOWING), Room(lm, TOKENS + FOLLOWING + 1)
    instance = task.generate(Draw.of(task.id, seed, room.context_tokens, index, count), room)
    following = lm.tokenize(instance.continuation, literal=True)[:FOLLOWING]
    read = Read.of(lm, instance.context)
    full = forced(read.under(FULL), following)

    def measure(context: Context) -> Row:
        own = forced(context, following)
        kls = (full.exp() * (full - own)).sum(-1).clamp_min(0)  # [n]
        return {"kl": float(kls.mean()), "agreed": float((full.argmax(-1) == own.argmax(-1)).double().mean())}

    return read, measure


@torch.inference_mode()
def forced(context: Context, following: list[int]) -> Tensor:
    """Log-probabilities `[n, V]` after each token of a continuation, `AT_ONCE` of which come at a time."""
    cache, parts = context.cache.fork(), []
    for ids in torch.tensor([following]).split(AT_ONCE, dim=1):
        logits = context.lm.model(ids, past_key_values=cache, use_cache=True).logits
        parts.append(logits[0].float().log_softmax(-1))
    return torch.cat(parts)


KINDS = {"number": number, "text": text}


def measure_all(
    lm: LanguageModel, kind: str, count: int, seed: int, recipes: Sequence[str], path: Path | None
) -> list[Row]:
    """The rows of all recipes on `count` texts, of which those in the file are taken from it."""
    same: Row = {"kind": kind, "seed": seed, "model": lm.name}
    same |= {"count": count} if kind == "number" else {}  # over which the depths are spread
    same |= {"dtype": str(lm.model.dtype).removeprefix("torch."), "tokens": TOKENS}
    rows = [row for row in read_rows(path) if same.items() <= row.items() and row["recipe"] in recipes]
    done = {(row["recipe"], row["index"]) for row in rows}
    for index in track(range(count), description=f"{kind}s, seed {seed}", disable=not sys.stderr.isatty()):
        left = [recipe for recipe in recipes if (recipe, index) not in done]
        if not left:
            continue
        read, measure = KINDS[kind](lm, index, count, seed)
        for recipe in left:
            context = read.under(recipe)
            held = {"kv_bytes": context.cache.kv_bytes, "kv_bytes_full": context.cache.kv_bytes_full}
            row = {
                "recipe": recipe,
                **same,
                "index": index,
                **held,
                **measure(context),
                "date": today(),
                "cpu": cpu_name(),
            }
            append_row(path, row)
            rows.append(row)
    return rows


def summary(recipe: str, rows: Sequence[Row]) -> str:
    """One line about a recipe, in which every number is compared with the full cache's on the same text."""
    mine = [row for row in rows if row["recipe"] == recipe]
    found = {(row["seed"], row["index"]): float(row["right"]) for row in mine if row["kind"] == "number"}
    whole = {
        (row["seed"], row["index"]): float(row["right"])
        for row in rows
        if row["recipe"] == FULL and row["kind"] == "number"
    }
    line = f"{recipe:36} {max(row['kv_bytes'] / row['kv_bytes_full'] for row in mine):6.2%} of the bytes at most"
    if found:
        score, loss = (
            mean_interval([*found.values()]),
            difference_interval([*found.values()], [whole[i] for i in found]),
        )
        line += f"; {sum(found.values()):.0f} of {len(found)} found ({score.low:.2f} to {score.high:.2f}), "
        line += f"full {sum(whole.values()):.0f} (difference {loss.value:+.3f}, {loss.low:+.3f} to {loss.high:+.3f})"
    if kls := [row["kl"] for row in mine if row["kind"] == "text"]:
        kl = bootstrap(kls)
        agreed = fmean(row["agreed"] for row in mine if row["kind"] == "text")
        line += f"; KL {kl.value:.4f} ({kl.low:.4f} to {kl.high:.4f}, largest of {len(kls)} texts {max(kls):.4f}), "
        line += f"top-1 {agreed:.1%}"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", help="of the computation and of the full cache")
    parser.add_argument("--recipe", action="append", help=f"repeatable; default: {', '.join(RECIPES)}")
    parser.add_argument("--numbers", type=int, default=20, help="texts with a planted number, for each seed")
    parser.add_argument("--texts", type=int, default=4, help="texts that go on, for each seed")
    parser.add_argument("--seed", type=int, action="append", help="repeatable; default: 0 and 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the lines are, and are appended")
    args = parser.parse_args()
    lm = steno.load(args.model, dtype=args.dtype)
    recipes = [FULL, *(str(as_recipe(text)) for text in args.recipe or RECIPES)]
    seeds, counts = args.seed or [0, 1], {"text": args.texts, "number": args.numbers}
    rows = [
        row
        for seed in seeds
        for kind, count in counts.items()
        for row in measure_all(lm, kind, count, seed, recipes, args.json)
    ]
    for seed in [[seed] for seed in seeds] + ([seeds] if len(seeds) > 1 else []):
        notice(f"seed {' and '.join(map(str, seed))}:")
        for recipe in recipes:
            notice(summary(recipe, [row for row in rows if row["seed"] in seed]))


if __name__ == "__main__":
    main()
