"""Check saved contexts: every digest, every length, every stream. Needs no model; exit status 1 if any is damaged."""

from __future__ import annotations

import argparse
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", help="written by `steno read` or Context.save")
    parser.add_argument("--json", action="store_true", help="print a JSON line for each file")


def run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from steno.codec.cache import read_tokens
    from steno.codec.container import SavedFile
    from steno.errors import StenoError

    failed = 0
    for name in arguments.files:
        error = None
        try:
            file = SavedFile(Path(name).expanduser())
            read_tokens(file)
            for group in file.groups:
                file.read_group(group)
        except StenoError as found:
            error, failed = str(found), 1
        if arguments.json:
            print(json.dumps({"file": name, "ok": error is None, "error": error}))
        elif error is None:
            print(f"{name}: whole")
        else:
            print(f"steno: error: {error}", file=sys.stderr)
    return failed
