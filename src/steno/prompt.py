"""A document and later questions as one chat turn, cut where the question begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from steno.errors import ModelError

_DOCUMENT, _QUESTION = "\u241estenodocument\u241e", "\u241estenoquestion\u241e"


@final
@dataclass(frozen=True, kw_only=True)
class Template:
    """What stands around a document and a question.

    before: up to the document; between: from the document to the question; after: from the question to the answer.
    """

    before: str
    between: str
    after: str

    @classmethod
    def of(cls, tokenizer: Any) -> Template:
        """The chat template of the tokenizer; plain text where it has none."""
        if not getattr(tokenizer, "chat_template", None):
            bos = tokenizer.bos_token or "" if getattr(tokenizer, "add_bos_token", False) else ""
            return cls(before=bos, between="\n\nQuestion: ", after="\nAnswer:")
        message = {"role": "user", "content": f"{_DOCUMENT}\n\n{_QUESTION}"}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        if text.count(_DOCUMENT) != 1 or text.count(_QUESTION) != 1:
            raise ModelError(
                "the chat template must show a message exactly once, so that the document can be cut from the question; "
                f"this one shows it {text.count(_DOCUMENT)} times."
            )
        before, rest = text.split(_DOCUMENT)
        between, after = rest.split(_QUESTION)
        return cls(before=before, between=between, after=after)
