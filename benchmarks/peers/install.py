"""Makes the environment of each peer, `.peers/NAME` in the checkout, and the model in the formats that they read.

What is there already is skipped; a peer that cannot be installed is reported and left out. Exit status: 0 all are there,
1 some are not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NPM = {"libllama": "@node-llama-cpp/linux-x64@3.22.1"}
"""What comes from the npm registry: there is no build of llama.cpp for AVX-512 among Python's wheels."""
BARE = {"lmcache": "lmcache==0.5.6"}
"""What is installed without its dependencies, of which CuPy and a dozen services are not needed for what is measured."""
UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}
"""Optional dependencies whose wheels are built for CUDA and break the import of a CPU build."""
STAMP = ".installed"


def main() -> None:
    names = sorted(path.stem for path in HERE.glob("*.txt"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--folder", type=Path, default=ROOT / ".peers", help="default: .peers in the checkout")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.peers if name not in names]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(names)}")
    failed = [name for name in arguments.peers or names if not install(name, arguments.folder / name)]
    if failed:
        sys.exit(f"not installed: {', '.join(failed)}; the others can be measured")


def install(name: str, folder: Path) -> bool:
    """Makes the environment of one peer unless its stamp says that it is there; whether it is there now."""
    requirements = HERE / f"{name}.txt"
    wanted = "\n".join(
        [requirements.read_text("utf-8"), NPM.get(name, ""), BARE.get(name, ""), *UNWANTED.get(name, ())]
    )
    stamp = folder / STAMP
    if stamp.exists() and stamp.read_text("utf-8") == wanted:
        print(f"{name}: is there")
        return True
    print(f"{name}: installing", flush=True)
    python = str(folder / "bin/python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    commands = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "install", "-r", str(requirements)],
    ]
    if name in BARE:
        commands.append([*pip, "install", "--no-deps", BARE[name]])
    if name in UNWANTED:
        commands.append([*pip, "uninstall", "--yes", *UNWANTED[name]])
    if name in NPM:
        commands.append(["npm", "install", "--no-save", "--silent", "--prefix", str(folder), NPM[name]])
    for command in commands:
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name}: FAILED: {error}", flush=True)
            return False
    stamp.write_text(wanted, "utf-8")
    return True


if __name__ == "__main__":
    main()
