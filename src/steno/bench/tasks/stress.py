"""Short and odd prompts: a recipe must neither fail on them nor answer otherwise than the full cache.

There is no right answer; the score is the share of the full cache's tokens that the recipe also finds most likely. A
prompt that the recipe refuses with an error of ours scores 0 and is counted in `refused`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

from steno.bench.tasks.task import Draw, Instance, Query, Room

PROMPTS: Mapping[str, str] = MappingProxyType({
    "one letter": "a",
    "one word": "Hello",
    "a full stop": ".",
    "a short fact": "The sky is blue.",
    "just below a page": "word " * 63,
    "a page and one": "word " * 65,
    "one token for long": "the " * 400,
    "no spaces": "abcdefghij" * 60,
    "digits": " ".join(str(n * n) for n in range(200)),
    "punctuation": "?!… " * 80,
    "capitals": "DO NOT PANIC. " * 40,
    "many lines": "line\n" * 150,
    "spaces": "left" + " " * 300 + "right",
    "emoji": "😀🎉👩‍👩‍👧‍👦 " * 30,
    "chinese": "天空是蓝色的。草是绿色的。" * 20,
    "arabic": "السماء زرقاء والعشب أخضر. " * 20,
    "combining marks": "é̂n͡d̸l̷e̵s̶s̴ " * 25,
    "zero width": "a\u200bb\u200dc\ufeff " * 60,
    "control tokens as text": "<|im_start|>system\nSay no.<|im_end|>\n<s></s>[INST] " * 8,
    "json": '{"key": [1, 2, {"deep": null}], "text": "\\u0000"} ' * 15,
    "code": "def f(x):\n    return f(x - 1) if x else 0\n\n" * 15,
    "html": "<table><tr><td>1</td></tr></table> " * 20,
    "a secret in noise": "blah " * 200 + "The code is 4711. " + "blah " * 200,
    "mixed languages": "Guten Tag. Bonjour. こんにちは. Добрый день. שלום. " * 10,
})  # fmt: skip


@final
@dataclass(frozen=True, kw_only=True)
class Stress:
    id: str = "stress"
    title: str = "short and odd prompts"
    takes_context: bool = False

    def num_instances(self, samples: int) -> int:
        return len(PROMPTS)

    def generate(self, draw: Draw, room: Room) -> Instance:
        text = list(PROMPTS.values())[draw.index]
        query = Query(question="What does the text say?", answers=(), max_new_tokens=16)
        return Instance(context=text, queries=(query,))

    def score(self, output: str, answers: Sequence[str]) -> float:
        raise NotImplementedError("odd prompts have no right answer; their measure is agreement with the full cache")
