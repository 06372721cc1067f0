"""List every method, or say all about some: paper, parameters, and how each differs from its paper.

Without a name: the kind, year and paper of each method, and whether it frees memory. Example: steno methods snapkv kivi
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

Described = dict[str, Any]
"""A method, as `describe_methods` has it."""
LABEL_WIDTH = 14
MIN_WIDTH = 40
PARAMETERS = re.compile(r"^Parameters\n-+\n(.*?)(?:\n\n|\Z)", re.DOTALL | re.MULTILINE)
PARAMETER = re.compile(r"^(\w[^\n]*)\n((?:    [^\n]*\n?)+)", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", nargs="*", help="say all about these methods and named recipes instead of listing every one"
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print a JSON list with all that is known of each method")


def run(arguments: argparse.Namespace) -> int:
    from steno.methods import describe_methods

    methods = describe_methods()
    if arguments.name:
        methods = _named(arguments.name, methods)
    if arguments.json:
        print(json.dumps(methods, indent=2))
    elif arguments.name:
        print("\n\n".join(map(_page, methods)))
    else:
        _print_list(methods)
    return 0


def _named(names: Sequence[str], methods: Sequence[Described]) -> list[Described]:
    """What bears these names, in their order; a stage and the named recipe of its paper may bear the same."""
    from steno.errors import BadArgument, nearest

    known = {method["id"] for method in methods}
    wrong = [name for name in dict.fromkeys(names) if name not in known]
    if wrong:
        raise BadArgument(
            " ".join(f"unknown method {x!r}; {nearest(x.lower(), known, where='`steno methods`')}" for x in wrong)
        )
    return [method for name in dict.fromkeys(names) for method in methods if method["id"] == name]


def _print_list(methods: Sequence[Described]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("kind", "id", "title", "year", "arXiv", "frees memory"):
        table.add_column(name, no_wrap=name != "title")
    for method in methods:
        frees = "yes" if method["frees_memory"] else "no"
        table.add_row(method["kind"], method["id"], method["title"], str(method["year"]), method["arxiv"], frees)
    Console().print(table)
    print("\nA recipe is a chain of them and one budget: snapkv(window=64) | adakv | kivi(bits=2) @ 20%")
    print(
        "A budget is tokens per KV head (512), a share of the prompt (20%), bytes (64MiB), or a share of the bytes that the"
    )
    print("prompt takes in a full cache (20% of bytes).")
    print("All about one, its parameters and how it differs from its paper: steno methods snapkv")


def _page(method: Described) -> str:
    """All that is known of a method, as wide as the terminal."""
    width = max(shutil.get_terminal_size().columns, MIN_WIDTH)
    is_recipe = method["kind"] == "recipe"
    lines = [f"{method['id']}, {'a named recipe' if is_recipe else method['kind']}"]

    def add(label: str, text: str, hang: int = 0) -> None:
        lines.append(
            textwrap.fill(
                text, width, initial_indent=f"  {label:{LABEL_WIDTH}}", subsequent_indent=" " * (2 + LABEL_WIDTH + hang),
                break_long_words=False, break_on_hyphens=False,
            )
        )  # fmt: skip

    add("stands for" if is_recipe else "title", method["title"])
    add("paper", f"{method['paper']}, {method['year']}")
    if method["arxiv"]:
        add("address", f"https://arxiv.org/abs/{method['arxiv']}")
    add("sees", ", ".join(need.lower().replace("_", " ") for need in method["needs"]) or "keys and values")
    add("trained", "yes" if method["trained"] else "no")
    add("frees memory", "yes" if method["frees_memory"] else "no")
    add("differs", method["differs"])
    if is_recipe and method["parameters"]:
        add("parameters", f"those of the stage {method['id']}: {', '.join(method['parameters'])}")
    else:
        for i, parameter in enumerate(list(_parameters(method)) if method["parameters"] else ["none"]):
            add("" if i else "parameters", parameter, hang=2)
    return "\n".join(lines)


def _parameters(method: Described) -> Iterator[str]:
    """Each parameter with its default, and what the docstring of the method says of it."""
    from steno.methods import METHODS

    section = PARAMETERS.search(inspect.getdoc(METHODS[method["id"]]) or "")
    said = {}
    for head, text in PARAMETER.findall(section[1] + "\n" if section else ""):
        names, _, kind = head.partition(" : ")
        for name in names.split(", "):
            said[name] = kind.partition("default ")[2] if name == names else "", " ".join(text.split())
    for name, value in method["parameters"].items():
        default, text = said.get(name, ("", ""))
        unit = default.removeprefix(str(value)) if default.startswith(f"{value} ") else ""
        yield f"{name}={value!r}{unit}" + (f": {text}" if text else "")
