"""The document and the question of these tests."""

from __future__ import annotations

from typing import Any

DOCUMENT = "The key is under the third stone, says Ms. Q; é € 😀. " * 6
QUESTION = "Where is the key?"


def answer(ctx: Any, question: str = QUESTION, **options: Any) -> str:
    return "".join(step.text for step in ctx.ask(question, **{"max_new_tokens": 12, **options}))
