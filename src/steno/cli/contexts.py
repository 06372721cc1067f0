"""What the commands about saved contexts have in common: opening a file, and what is told of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steno.codec.container import MAGIC, SavedFile
from steno.codec.identity import recipe_of
from steno.errors import BadArgument, DamagedFile


def describe(name: str) -> dict[str, Any]:
    """What the header of a file says, and its bytes; raises BadArgument or DamagedFile."""
    file = SavedFile(Path(name).expanduser())
    header = file.header
    return {
        "file": name,
        "file_bytes": file.num_bytes,
        "decoded_bytes": file.decoded_bytes,
        "format": 1,
        "steno": header.get("steno"),
        "model": header.get("model"),
        "tokenizer": header.get("tokenizer"),
        "dtype": header.get("dtype"),
        "recipe": str(recipe_of(file)),
        "level": header.get("level"),
        "has_question": header.get("has_question"),
        "prompt_tokens": file.specs[0].num_rows if file.specs else 0,
        "layers": num_layers(header),
        "chunks": len(header["chunks"]),
    }


def check_out(name: str) -> None:
    """Raises BadArgument if a context must not be written there: of files only saved contexts are replaced."""
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            raise BadArgument(f"cannot write {name}: it is a folder; name a file.")
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                if file.read(len(MAGIC)) != MAGIC:
                    raise BadArgument(f"{name} is there already and no saved context; name another file.")
    except OSError as error:
        raise BadArgument(f"cannot write {name}: {error.strerror or error}.") from None


def num_layers(header: dict[str, Any]) -> int:
    """Layers that the header of a file tells of; raises DamagedFile if it does not."""
    try:
        return len(header["cache"]["layers"])
    except (KeyError, TypeError):
        raise DamagedFile("the header of a saved context must say what its layers hold.") from None
