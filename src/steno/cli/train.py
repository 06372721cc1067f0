"""Train the small networks of a method on some text; the model itself stays as it is.

The result lies where recipes look for it, or in --out FILE, to be named as `METHOD(weights='FILE')`. Without --data it
learns from the Python language reference. A run that was interrupted goes on with --resume.
"""

from __future__ import annotations

import argparse

from steno.cli import learning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    learning.add_arguments(parser, "train")


def run(arguments: argparse.Namespace) -> int:
    return learning.run(arguments)
