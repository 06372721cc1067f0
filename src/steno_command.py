"""The command `steno`, as it is installed: it parses its arguments before it waits for torch.

`import steno` imports torch and transformers, seconds that a version, a help text or a wrong option need not cost. So
the package is entered here without running its `__init__`, which follows as soon as a command is to be run.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec


def run() -> int:
    """Runs one command and returns its exit status."""
    spec = find_spec("steno")
    assert spec is not None  # it is installed with this file
    assert spec.loader is not None
    package = module_from_spec(spec)
    sys.modules["steno"] = package
    from steno.cli.main import parser, run_command

    arguments = parser().parse_args()
    spec.loader.exec_module(package)
    return run_command(arguments)


if __name__ == "__main__":
    sys.exit(run())
