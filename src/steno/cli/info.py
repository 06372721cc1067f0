"""Say what a saved context is: its model, recipe, tokens and bytes. Reads the header alone, and needs no model."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="written by `steno read` or Context.save")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from steno.cli.contexts import describe
    from steno.cli.show import megabytes, print_table

    found = describe(arguments.file)
    if arguments.json:
        print(json.dumps(found))
        return 0
    model = found["model"] if isinstance(found["model"], dict) else {}
    print_table(
        [
            ("model", f"{model.get('name')} ({model.get('hash')})"),
            ("recipe", found["recipe"]),
            ("quality", str(found["level"])),
            ("dtype", str(found["dtype"])),
            ("prompt tokens", f"{found['prompt_tokens']:,}"),
            ("layers", str(found["layers"])),
            ("file", megabytes(found["file_bytes"])),
            ("decoded", megabytes(found["decoded_bytes"])),
        ]
    )
    return 0
