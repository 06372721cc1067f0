"""List every method: its kind, paper and year, and whether it frees memory."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a JSON list with all that is known of each method")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from steno.methods import describe_methods

    methods = describe_methods()
    if arguments.json:
        print(json.dumps(methods, indent=2))
        return 0
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
    return 0
