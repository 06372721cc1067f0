"""Rooms import upwards only: a file imports from its own room and from the lines above it, and methods' rooms never meet."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "steno"
ORDER = [
    {"errors", "types", "version"}, {"calibration"}, {"kernels"}, {"cache"}, {"methods"}, {"recipe"}, {"bytes_budget"},
    {"pipeline"}, {"models"}, {"codec"}, {"store"}, {"decode"}, {"prompt", "replay"}, {"context"}, {"session"},
    {"serve", "bench", "learn", "integrations"}, {"cli"}, {"__main__"},
]  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
SAME_LINE = {("types", "errors")}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def imports(path: Path) -> set[tuple[str, ...]]:
    """The modules of steno that a file imports, without the leading `steno`, wherever in the file it does."""
    package, found = ("steno", *path.relative_to(SOURCE).parent.parts), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split(".")) if node.module else base
            found |= {(*module, alias.name) for alias in node.names} if module == ("steno",) else {module}
    return {module[1:] for module in found if module[0] == "steno" and len(module) > 1}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_up(path: Path) -> None:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    room = parts[0]
    assert room in LEVEL, f"{room} has no place in the order of rooms"
    for module in imports(path):
        allowed = module[0] == room or LEVEL[module[0]] < LEVEL[room] or (room, module[0]) in SAME_LINE
        assert allowed, f"{'.'.join(parts)} imports {'.'.join(module)}"
        if room == module[0] == "methods" and len(parts) > 2 and len(module) > 2:
            assert module[1] == parts[1], f"{'.'.join(parts)} imports from the room beside it, {'.'.join(module)}"


def test_the_check_can_see() -> None:
    assert ("cache", "layer") in imports(SOURCE / "models" / "host.py")
    assert any(module[0] == "kernels" for module in imports(SOURCE / "kernels" / "attention" / "dispatch.py"))
