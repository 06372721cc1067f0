"""The command `steno`: one parser, one place where errors become exit statuses.

Commands import what they run with when they run: a help text or a version does not wait for torch.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from steno.cli import ask, bench, calibrate, info, methods, read, store, train, verify
from steno.cli.status import FAILED, INTERRUPTED, WRONG_USAGE
from steno.errors import BadArgument, CalibrationError, StenoError, StenoWarning
from steno.version import VERSION

COMMANDS = {
    "ask": ask, "read": read, "info": info, "verify": verify, "bench": bench, "methods": methods, "calibrate": calibrate,
    "train": train, "store": store,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; each command's file adds its own arguments."""
    main = argparse.ArgumentParser(
        prog="steno",
        description="Steno writes an LLM's memory in shorthand: read a long text, keep its KV cache in a fraction of the "
        "bytes, and ask questions about it.",
        epilog="exit status: 0 done, 1 failed, 2 wrong usage or input. Example: steno ask 'Who holds the key?' "
        "--document book.txt --recipe 'shorthand @ 43%'",
    )
    main.add_argument("--version", action="version", version=f"steno {VERSION}")
    commands = main.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        doc = (module.__doc__ or "").strip()
        sub = commands.add_parser(
            name,
            help=doc.split("\n")[0],
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
    return main


def _notice(message: Warning | str, *args: object) -> None:
    print(f"steno: {message}", file=sys.stderr)


def run(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    return run_command(parser().parse_args(argv))


def run_command(arguments: argparse.Namespace) -> int:
    """Runs the command that was parsed and returns its exit status."""
    with warnings.catch_warnings():
        warnings.simplefilter("once", StenoWarning)
        warnings.showwarning = _notice  # type: ignore[assignment]
        try:
            return COMMANDS[arguments.command].run(arguments)
        except (BadArgument, CalibrationError) as error:
            print(f"steno: error: {error}", file=sys.stderr)
            return WRONG_USAGE
        except StenoError as error:
            print(f"steno: error: {error}", file=sys.stderr)
            return FAILED
        except KeyboardInterrupt:
            print("\nsteno: interrupted; nothing was changed.", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # the reader of our output has gone, e.g. `steno ask … | head`
            sys.stderr.close()
            return 0


if __name__ == "__main__":
    sys.exit(run())
