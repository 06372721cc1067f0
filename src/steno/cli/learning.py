"""What `steno train` and `steno calibrate` have in common."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from steno.cli.document import language_reference, read_document, whole_reference
from steno.cli.status import INTERRUPTED
from steno.errors import BadArgument, nearest
from steno.learn import LEARNERS, Command
from steno.models.default import DEFAULT_MODEL


def add_arguments(parser: argparse.ArgumentParser, command: Command) -> None:
    """The arguments of `steno train` or `steno calibrate`."""
    learners = [learner for learner in LEARNERS.values() if learner.command == command]
    what = "; ".join(f"{learner.id}: {learner.what}" for learner in learners)
    parser.add_argument("method", metavar="METHOD", type=lambda text: _learner_id(text, command), help=what)
    parser.add_argument("--model", metavar="M", default=DEFAULT_MODEL, help="as for `steno ask` (default: %(default)s)")
    parser.add_argument("--data", metavar="FILE", help="text to learn from, - for standard input")
    parser.add_argument("--out", metavar="FILE", help="safetensors file to write; without it, where recipes find it")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of every random draw (default: %(default)s)")
    if command == "train":
        parser.add_argument("--steps", metavar="N", type=int, help="one passage each (default: the method's own)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint of an interrupted run")
    parser.set_defaults(steps=None)


def _learner_id(text: str, command: Command) -> str:
    """A method of the command; raises for argparse if it is not one."""
    learner = LEARNERS.get(text)
    if learner is None or learner.command != command:
        names = [learner.id for learner in LEARNERS.values() if learner.command == command]
        way = f"write `steno {learner.command} {text}`" if learner is not None else nearest(text, names)
        raise argparse.ArgumentTypeError(f"`steno {command}` knows no {text}; {way}")
    return text


def run(arguments: argparse.Namespace) -> int:
    """Learns, writes the file and says where."""
    from importlib import import_module

    from steno.calibration import save_calibration
    from steno.cli.show import progress_bar
    from steno.learn.options import Options
    from steno.models.learned import learned_file
    from steno.session import load
    from steno.version import VERSION

    learner = LEARNERS[arguments.method]
    if arguments.steps is not None and arguments.steps < 1:
        raise BadArgument(f"`--steps` must be >= 1; got {arguments.steps}.")
    steps = arguments.steps or learner.steps
    if arguments.out and not os.access(folder := Path(arguments.out).expanduser().parent, os.W_OK):
        raise BadArgument(f"`--out` must lie in a folder that is there and can be written to; got {folder}.")
    text = read_document(arguments.data) if arguments.data else None
    lm = load(arguments.model)
    what = arguments.data
    if not learner.reads_text:
        text, what = "", "random tokens"
    elif text is None:
        text, what = whole_reference() if learner.is_long else language_reference(lambda text: len(lm.tokenize(text)))
    out = Path(arguments.out).expanduser() if arguments.out else learned_file(learner.id, lm.loaded.model_hash)
    if not arguments.out:
        out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "method": learner.id,
        "model": lm.name,
        "model_hash": lm.loaded.model_hash,
        "data": str(what),
        "seed": str(arguments.seed),
        "steps": str(steps),
        "steno": VERSION,
    }
    checkpoint = out.with_name(out.name + ".checkpoint")
    if not arguments.resume:
        checkpoint.unlink(missing_ok=True)
    with progress_bar() as progress:
        options = Options(
            seed=arguments.seed, steps=steps, identity=str(about), checkpoint=checkpoint, progress=progress
        )
        try:
            tensors = import_module(learner.module).learn(lm, text, options)
        except KeyboardInterrupt:
            if not checkpoint.exists():
                raise
            print(
                "\nsteno: interrupted; what was done is kept: the same command with --resume goes on.", file=sys.stderr
            )
            return INTERRUPTED
    save_calibration(out, tensors, about)
    checkpoint.unlink(missing_ok=True)
    print(f"wrote {out}: {learner.what} of {lm.name}, learned from {what}", file=sys.stderr)
    return 0
