"""Gather once, on some text, what a method otherwise estimates from each prompt.

expected_attention: mean and covariance of the model's queries. Use the file with
`--recipe "expected_attention(statistics='FILE') @ 50%"`. Without --data it reads the Python language reference.
"""

from __future__ import annotations

import argparse
import sys

from steno.cli.document import language_reference, read_document
from steno.models.default import DEFAULT_MODEL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", metavar="METHOD", choices=["expected_attention"], help="expected_attention")
    parser.add_argument("--model", metavar="M", default=DEFAULT_MODEL, help="as for `steno ask` (default: %(default)s)")
    parser.add_argument("--data", metavar="FILE", help="text to calibrate on, - for standard input")
    parser.add_argument("--out", metavar="FILE", required=True, help="safetensors file to write")


def run(arguments: argparse.Namespace) -> int:
    from steno.cli.show import progress_bar
    from steno.session import load

    text = read_document(arguments.data) if arguments.data else None
    lm = load(arguments.model)
    what = arguments.data
    if text is None:
        text, what = language_reference(lambda text: len(lm.tokenize(text)))
    with progress_bar() as progress:
        lm.calibrate_expected_attention(text, arguments.out, progress=progress)
    print(f"wrote {arguments.out}: query statistics of {lm.name} over {what}", file=sys.stderr)
    return 0
