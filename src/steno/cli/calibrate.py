"""Gather once, on some text, what a method otherwise estimates from each prompt or cannot do without.

The result lies where recipes look for it, or in --out FILE, to be named as `METHOD(weights='FILE')` or, for methods that
can do without, `METHOD(statistics='FILE')`. Without --data it reads the Python language reference; razorattention reads
random tokens. An interrupted run goes on with --resume: commvq and kvquant, which take minutes, keep each layer that they
have fitted; the others take so little that they begin anew.
"""

from __future__ import annotations

import argparse

from steno.cli import learning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    learning.add_arguments(parser, "calibrate")


def run(arguments: argparse.Namespace) -> int:
    return learning.run(arguments)
