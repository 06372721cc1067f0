"""What the commands that use a store have in common: which one, whose, and how large it may be."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from steno.errors import BadArgument

if TYPE_CHECKING:
    from steno.store.store import Store


def add_place(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Adds the options that name a store. default: where it is if `--store` is not given; None: nowhere."""
    where = f" (default: {default})" if default else ""
    group = parser.add_argument_group("store")
    group.add_argument(
        "--store", metavar="PLACE",
        help="folder, redis://HOST:PORT/0, or a URL that fsspec opens, such as s3://bucket/folder" + where,
    )  # fmt: skip
    group.add_argument("--tenant", metavar="T", default="", help="whose entries; others' are never seen (default: '')")
    group.add_argument("--quota", metavar="SIZE", help="the most that the tenant's entries may take, e.g. 20GiB")
    group.add_argument("--key-file", metavar="FILE", help="the tenant's key, 16, 24 or 32 bytes: entries are sealed")


def open_place(arguments: argparse.Namespace, default: str | None = None) -> Store | None:
    """The store that the options name; None if they name none and there is no default."""
    from pathlib import Path

    from steno.recipe import Budget
    from steno.store.store import Store, read_key

    source = arguments.store or default
    if source is None:
        for name in ("tenant", "quota", "key_file"):
            if getattr(arguments, name):
                raise BadArgument(f"--{name.replace('_', '-')} needs a --store.")
        return None
    quota = Budget.parse(arguments.quota).bytes if arguments.quota else None
    if arguments.quota and quota is None:
        raise BadArgument(f"--quota must be a number of bytes with its unit, e.g. 20GiB; got {arguments.quota!r}.")
    key = read_key(Path(arguments.key_file).expanduser()) if arguments.key_file else None
    return Store(source, tenant=arguments.tenant, quota_bytes=quota, key=key)
