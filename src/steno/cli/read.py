"""Read a document and save its compressed memory to a file, for `steno ask --context FILE`.

The file holds the tokens of the document and is readable by its owner alone.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from steno.cli.ask import DEFAULT_RECIPE
from steno.cli.document import read_document
from steno.models.default import DEFAULT_MODEL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("document", metavar="DOCUMENT", help="text file to read, - for standard input")
    parser.add_argument("--out", metavar="FILE", required=True, help="file to write, e.g. book.steno")
    parser.add_argument("--model", metavar="M", default=DEFAULT_MODEL, help="as for `steno ask` (default: %(default)s)")
    parser.add_argument("--recipe", metavar="R", default=DEFAULT_RECIPE, help="what to keep (default: %(default)r)")
    parser.add_argument(
        "--quality",
        metavar="Q",
        default="lossless",
        help="of the file: lossless, or q1 (smallest) to q5, which keep the whole of what the recipe holds with small errors "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--refinements",
        metavar="N",
        type=int,
        default=0,
        help="write a level as a coarse layer and N layers that refine it, 0 to 3 (default: %(default)s)",
    )
    parser.add_argument("--dtype", metavar="D", help="as for `steno ask`")
    parser.add_argument("--device", metavar="D", help="as for `steno ask`")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    from steno.cli.contexts import check_out
    from steno.cli.show import megabytes, progress_bar
    from steno.codec.quality import check_quality
    from steno.recipe import parse_recipe
    from steno.session import load

    recipe = parse_recipe(arguments.recipe)  # a typing mistake is told before anything is loaded
    check_quality(arguments.quality, arguments.refinements)
    check_out(arguments.out)
    document = read_document(arguments.document)
    lm = load(arguments.model, dtype=arguments.dtype, device=arguments.device)
    with progress_bar() as progress:
        context = lm.read(document, recipe, progress=progress)
    file_bytes = context.save(arguments.out, arguments.quality, refinements=arguments.refinements)
    report = context.report()
    if arguments.json:
        print(
            json.dumps(
                {"file": arguments.out, "file_bytes": file_bytes, "quality": arguments.quality, **asdict(report)}
            )
        )
    else:
        print(f"{report}\nwrote {arguments.out}: {megabytes(file_bytes)}")
    return 0
