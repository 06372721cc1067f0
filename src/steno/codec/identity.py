"""Which model read a saved context, and whether this one is it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from steno.codec.container import SavedFile
from steno.errors import BadArgument, DamagedFile, RecipeError
from steno.models.load import LoadedModel
from steno.recipe import Recipe, parse_recipe
from steno.version import VERSION


@final
@dataclass(frozen=True, kw_only=True)
class HowRead:
    """How the tokens of a context were read, so that they can be read again with the same outcome.

    prefix_tokens: that a replay always keeps. chunk_tokens: after so many a method that can has evicted; None: it did not.
    pass_tokens: of each forward pass; None: `chunk_tokens`, or all at once.
    """

    prefix_tokens: int = 0
    chunk_tokens: int | None = None
    pass_tokens: int | None = None

    def num_pass_tokens(self, num_tokens: int) -> int:
        """Tokens of each forward pass over so many."""
        return self.pass_tokens or self.chunk_tokens or num_tokens


def how_read(file: SavedFile, num_tokens: int) -> HowRead:
    """How the tokens of a file were read; raises `DamagedFile` if it does not say."""
    try:
        fields = dict(file.header["read"])
        how = HowRead(**fields)
        counts = [n for n in (how.chunk_tokens, how.pass_tokens) if n is not None]
        if not all(type(n) is int and n > 0 for n in counts) or type(how.prefix_tokens) is not int:
            raise ValueError("it has other counts of tokens than numbers")
        if not 0 <= how.prefix_tokens <= num_tokens:
            raise ValueError(f"{how.prefix_tokens} of {num_tokens} tokens cannot be its prefix")
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{file.path} does not say how it was read: {error}.") from None
    return how


def about_model(loaded: LoadedModel) -> dict[str, Any]:
    """What the header of a file says of the model: its name, and by what it is known again."""
    config = loaded.model.config.get_text_config(decoder=True)
    return {
        "steno": VERSION,
        "model": {"name": loaded.name, "hash": loaded.model_hash, "type": config.model_type, "weights": loaded.weights},
        "tokenizer": loaded.tokenizer_hash,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "rope": getattr(config, "rope_parameters", None),
    }


def check_model(file: SavedFile, loaded: LoadedModel) -> None:
    """Raises BadArgument if another model, tokenizer or dtype wrote the file, DamagedFile if it does not say."""
    own, header = about_model(loaded), file.header
    try:
        name, found = header["model"]["name"], header["model"]["hash"]
        tokenizer, dtype, rope = header["tokenizer"], header["dtype"], header["rope"]
    except (KeyError, TypeError):
        raise DamagedFile(f"{file.path} does not say which model read it.") from None
    if dtype != own["dtype"]:
        raise BadArgument(f"{file.path} holds a cache in {dtype}; load the model with dtype={dtype!r}.")
    if found != loaded.model_hash or rope != own["rope"]:
        raise BadArgument(f"{file.path} was read by {name} (hash {found}), not by {loaded.name} ({loaded.model_hash}).")
    if tokenizer != own["tokenizer"]:
        raise BadArgument(f"{file.path} was read with another tokenizer ({tokenizer}) than this model's.")


def recipe_of(file: SavedFile) -> Recipe:
    """The recipe under which a file was read; raises DamagedFile if this steno does not know it."""
    try:
        return parse_recipe(file.header["recipe"])
    except (KeyError, TypeError, AttributeError, RecipeError) as error:
        raise DamagedFile(f"{file.path} has a recipe that cannot be read: {error}") from None
