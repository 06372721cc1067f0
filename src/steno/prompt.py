"""A document and later questions as one chat turn, cut where the question begins, and a model that is prompted so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

from steno.decode.text import sentence_ends
from steno.errors import ModelError, PromptError
from steno.models.host import NAME
from steno.models.load import LoadedModel

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


class PromptedModel:
    """A model under steno's attention, its tokenizer, and how it is prompted."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.model, self.tokenizer, self.name = loaded.model, loaded.tokenizer, loaded.name
        self.model.set_attn_implementation(NAME)
        self.template = Template.of(self.tokenizer)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ids = [self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id]
        flat = [i for x in ids for i in (x if isinstance(x, list) else [x])]
        return frozenset(i for i in flat if i is not None)

    @cached_property
    def sentence_ends(self) -> frozenset[int]:
        """Tokens that end a sentence."""
        return sentence_ends(self.tokenizer)

    def tokenize(self, text: str, *, literal: bool = False) -> list[int]:
        """Token ids of text, none added; special tokens in it are recognised, or plain text if `literal`."""
        # verbose=False: a text longer than the model gets our own error, not a warning before it
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=literal, verbose=False))

    def prompt_tokens(self, document: str) -> tuple[list[int], int]:
        """Tokens of the prompt up to the end of the document, and how many stand before the document.

        The document is tokenized apart, so that it cannot contain the template's control tokens by accident.
        """
        prefix = self.tokenize(self.template.before)
        return prefix + self.tokenize(document, literal=True), len(prefix)

    def question_tokens(self, question: str) -> list[int]:
        """Tokens from the end of the document to the end of a question about it."""
        if not question.strip():
            raise PromptError("the question is empty.")
        return self.tokenize(self.template.between) + self.tokenize(question, literal=True)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def check_length(self, num_tokens: int, reserve_tokens: int) -> None:
        """Raises PromptError if that many tokens and the reserve do not fit the model's positions."""
        positions = self.loaded.max_positions
        if positions is not None and num_tokens + reserve_tokens > positions:
            over = num_tokens + reserve_tokens - positions
            raise PromptError(
                f"the prompt has {num_tokens} tokens and {reserve_tokens} are kept for question and answer, {over} more than "
                f"the {positions} positions of {self.name}: shorten the document by about {over} tokens "
                f"({100 * over / num_tokens:.0f}%) or use a model with a longer context."
            )
