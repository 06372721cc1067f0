"""Keep what was read, and find it again: ls, put, get, gc, verify.

An entry is a chunk, 256 tokens that every text with the same beginning shares, or a context, what a recipe kept of one text. What
a document is stored as depends on the model and the recipe; `steno ask --store PLACE` uses and fills the same store.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from steno.cli.ask import DEFAULT_RECIPE
from steno.cli.document import read_document
from steno.cli.places import add_place, open_place
from steno.errors import BadArgument, StoreError
from steno.models.default import DEFAULT_MODEL

if TYPE_CHECKING:
    from steno.session import LanguageModel
    from steno.store.shelf import Shelf
    from steno.store.store import Store

DEFAULT_PLACE = "the folder `store` of steno's cache directory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("ls", help="list the entries, the least recently used first")
    put = actions.add_parser("put", help="read a document, unless it is there, and leave it in the store")
    get = actions.add_parser("get", help="write what the store holds of a document to a file for `steno ask --context`")
    gc = actions.add_parser(
        "gc", help="remove leftovers of interrupted writes, what no read can reach, what is over the quota"
    )
    verify = actions.add_parser("verify", help="check every byte of every entry; exit status 1 if any is damaged")
    for sub in (put, get):
        sub.add_argument("document", metavar="DOCUMENT", help="text file, - for standard input")
        sub.add_argument(
            "--model", metavar="M", default=DEFAULT_MODEL, help="as for `steno ask` (default: %(default)s)"
        )
        sub.add_argument("--recipe", metavar="R", default=DEFAULT_RECIPE, help="what to keep (default: %(default)r)")
        sub.add_argument("--dtype", metavar="D", help="as for `steno ask`")
        sub.add_argument("--device", metavar="D", help="as for `steno ask`")
    pins = put.add_mutually_exclusive_group()
    pins.add_argument("--pin", action="store_true", help="never remove these entries for the quota")
    pins.add_argument("--unpin", action="store_true", help="let them go again")
    get.add_argument("--out", metavar="FILE", required=True, help="file to write, e.g. book.steno")
    verify.add_argument(
        "--remove", action="store_true", help="remove what is damaged; it is then read anew when needed"
    )
    for sub, lines in ((listing, True), (put, False), (get, False), (gc, False), (verify, True)):
        add_place(sub, default=DEFAULT_PLACE)
        sub.add_argument("--json", action="store_true", help=f"print {'JSON lines' if lines else 'one JSON object'}")


def run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from steno.models.folder_cache import default_cache_dir

    place = arguments.store
    if place and "://" not in place and arguments.action != "put" and not Path(place).expanduser().is_dir():
        raise BadArgument(f"there is no store at {place}, which is no folder; `steno store put` begins one.")
    store = open_place(arguments, str(default_cache_dir() / "store"))
    assert store is not None, "there is a default"
    actions = {"ls": _list, "put": _put, "get": _get, "gc": _gc, "verify": _verify}
    return actions[arguments.action](arguments, store)


def _list(arguments: argparse.Namespace, store: Store) -> int:
    from datetime import datetime

    from steno.cli.show import megabytes, print_table
    from steno.store.check import describe_entry

    rows: list[tuple[str, ...]] = []
    total = 0
    for entry in store.entries():
        told = describe_entry(store, entry.name)
        total += entry.num_bytes
        if arguments.json:
            fields = {"name": entry.name, "bytes": entry.num_bytes, "used_at": entry.used_at, "pinned": entry.is_pinned}
            print(json.dumps(fields | told))
            continue
        used = f"{datetime.fromtimestamp(entry.used_at):%Y-%m-%d %H:%M}"
        what = f"{told['tokens']} tokens, {told['model']}, {told['recipe']}" if told else "damaged"
        short = f"{entry.name[:12]}…{entry.name[64:]}{' (pinned)' if entry.is_pinned else ''}"
        rows.append((short, megabytes(entry.num_bytes), used, what))
    if not arguments.json:
        if rows:
            print_table(rows)
        print(f"{len(rows)} entries, {megabytes(total)}")
    return 0


def _put(arguments: argparse.Namespace, store: Store) -> int:
    from steno.cli.show import progress_bar

    lm, shelf, document = _shelf(arguments, store)
    with progress_bar() as progress:
        context = lm.read(document, arguments.recipe, progress=progress)
    present = {entry.name for entry in store.entries()}
    missing = [name for name in shelf.names if name not in present]
    if missing:
        raise StoreError(f"{len(missing)} of {len(shelf.names)} entries of this text could not be kept in the store.")
    if arguments.pin or arguments.unpin:
        store.pin(shelf.names, pinned=arguments.pin)
    told = {"tokens": len(context.tokens), "stored_tokens": context.stored_tokens, "entries": shelf.names}
    return _tell(
        arguments,
        told,
        f"{len(context.tokens)} tokens in {len(shelf.names)} entries, {context.stored_tokens} there before",
    )


def _get(arguments: argparse.Namespace, store: Store) -> int:
    from steno.cli.contexts import check_out
    from steno.cli.show import megabytes

    check_out(arguments.out)
    lm, shelf, document = _shelf(arguments, store)
    present = {entry.name for entry in store.entries()}
    needed = shelf.needed
    if not set(needed) <= present:
        count = len(set(needed) & present)
        raise StoreError(
            f"the store holds {count} of {len(needed)} entries of this text: `steno store put` reads the rest."
        )
    context = lm.read(document, arguments.recipe)
    file_bytes = context.save(arguments.out)
    told = {
        "file": arguments.out,
        "file_bytes": file_bytes,
        "tokens": len(context.tokens),
        "stored_tokens": context.stored_tokens,
    }
    return _tell(arguments, told, f"wrote {arguments.out}: {megabytes(file_bytes)}")


def _gc(arguments: argparse.Namespace, store: Store) -> int:
    from steno.store.check import unreachable

    lost = unreachable(store)
    for name in lost:
        store.remove(name)
    over = store.sweep()
    kept = sum(entry.num_bytes for entry in store.entries())
    told = {"unreachable": lost, "over_quota": over, "kept_bytes": kept}
    return _tell(
        arguments, told, f"removed {len(lost)} that no read can reach and {len(over)} over the quota; {kept} bytes stay"
    )


def _verify(arguments: argparse.Namespace, store: Store) -> int:
    from steno.store.check import check_entry

    entries, damaged = store.entries(), 0
    for entry in entries:
        error = check_entry(store, entry.name)
        if error is not None:
            damaged += 1
            if arguments.remove:
                store.remove(entry.name)
            if not arguments.json:
                print(f"steno: error: {error}", file=sys.stderr)
        if arguments.json:
            print(json.dumps({"name": entry.name, "ok": error is None, "error": error}))
    if not arguments.json:
        print(f"{len(entries)} entries, {damaged} damaged{' and removed' if damaged and arguments.remove else ''}")
    return 1 if damaged else 0


def _shelf(arguments: argparse.Namespace, store: Store) -> tuple[LanguageModel, Shelf, str]:
    from steno.recipe import parse_recipe
    from steno.session import load

    recipe = parse_recipe(arguments.recipe)  # a typing mistake is told before anything is loaded
    document = read_document(arguments.document)
    lm = load(arguments.model, store=store, dtype=arguments.dtype, device=arguments.device)
    shelf = lm.shelf_of(document, recipe)
    assert shelf is not None, "there is a store"
    return lm, shelf, document


def _tell(arguments: argparse.Namespace, fields: dict[str, Any], text: str) -> int:
    print(json.dumps(fields) if arguments.json else text)
    return 0
