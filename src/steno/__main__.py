"""`python -m steno` is the command `steno`."""

import sys

from steno.cli.main import run

sys.exit(run())
