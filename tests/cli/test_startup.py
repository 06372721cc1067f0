"""What is answered without a model is answered at once: nothing heavy is imported for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from steno.cli.main import COMMANDS

HEAVY = ("torch", "transformers", "numpy", "rich", "tokenizers", "huggingface_hub")
REPORT = (
    "import atexit, sys; atexit.register(lambda: print(*[m for m in {heavy} if m in sys.modules], file=sys.stderr))"
)


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    """Runs the installed command in a fresh interpreter; the last line of standard error names what heavy it imported."""
    code = (
        f"{REPORT.format(heavy=HEAVY)}; sys.argv = ['steno', *{argv!r}]; import steno_command as c; sys.exit(c.run())"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("argv", [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_version_and_help_import_nothing_heavy(argv: list[str]) -> None:
    done = command(*argv)
    assert done.returncode == 0
    assert done.stdout
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("argv", [[], ["nothing"], ["ask"], ["ask", "q", "--max-new-tokens", "many"]], ids=repr)
def test_wrong_usage_imports_nothing_heavy(argv: list[str]) -> None:
    done = command(*argv)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0].startswith("usage: steno")
    assert lines[-1].strip() == ""


def test_a_command_runs_with_the_whole_package(tiny_folder: Path, tmp_path: Path) -> None:
    document = tmp_path / "text.txt"
    document.write_text("the hen is here. " * 4)
    done = command(
        "ask", "he?", "--model", str(tiny_folder), "--document", str(document), "--max-new-tokens", "2",
        "--recipe", "int8", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('{"answer"')
    assert "torch" in done.stderr  # the report can see


def test_an_error_of_a_command_keeps_its_status() -> None:
    done = command("ask", "q", "--recipe", "nonsense")
    assert done.returncode == 2
    assert "steno: error: " in done.stderr
    assert "Traceback" not in done.stderr
