"""Writes the golden files: contexts of tiny seeded models in every form that a file can hold, and what is in them.

    PYTHONPATH=src:tests python tests/golden/make.py

Only a new version of the format, or a form that is not among them, is a reason to run it. `expected.json` has of every file
the digest of what is stored, and a few numbers of what it decodes to.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

import steno
from steno.codec.container import SavedFile
from tiny import save_with_bytes

HERE = Path(__file__).parent
DOCUMENT = "The key is under the third stone, says Ms. Q; é € 😀. " * 6
FILES = {
    "full": ("full", "lossless", 0, "fp32"),
    "full-bf16": ("full", "lossless", 0, "bf16"),
    "pages": ("kivi(bits=2)", "lossless", 0, "bf16"),
    "ragged": ("snapkv(window=16) | adakv | kivi(bits=4) @ 50%", "lossless", 0, "bf16"),
    "counts": ("kvmerger @ 60%", "lossless", 0, "bf16"),
    "fp8": ("fp8", "lossless", 0, "bf16"),
    "nvfp4": ("nvfp4", "lossless", 0, "bf16"),
    "q4_0": ("q4_0", "lossless", 0, "bf16"),
    "rotated": ("snapkv(window=16) | adakv | hadamard | int4 @ 50%", "lossless", 0, "bf16"),
    "q1": ("full", "q1", 0, "bf16"),
    "q3": ("full", "q3", 0, "bf16"),
    "q5-refined": ("full", "q5", 2, "bf16"),
    "q3-ragged": ("snapkv(window=16) | adakv | kivi(bits=4) @ 50%", "q3", 1, "bf16"),
}
"""Recipe, quality, refinements, dtype."""


def stored_digest(path: Path) -> str:
    """Of everything that a file holds, decoded without loss."""
    file, found = SavedFile(path), hashlib.sha256()
    for group in file.groups:
        for number, x in sorted(file.read_group(group).items()):
            found.update(f"{number} {x.dtype} {[*x.shape]}".encode())
            found.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def figures(heads: list[tuple[np.ndarray, np.ndarray]]) -> list[list[float]]:
    """Of keys and of values of each head: the norm, the mean, and the projection on a fixed direction."""
    found = []
    for pair in heads:
        for x in pair:
            direction = np.cos(np.arange(x.size)).reshape(x.shape)
            found.append([float(np.linalg.norm(x)), float(x.mean()), float((x * direction).sum())])
    return found


def main() -> None:
    expected = {}
    with tempfile.TemporaryDirectory() as folder:
        place = save_with_bytes(Path(folder) / "tiny", "llama")
        for name, (recipe, quality, refinements, dtype) in FILES.items():
            lm = steno.load(place, dtype=dtype)
            path = HERE / f"{name}.steno"
            lm.read(DOCUMENT, recipe).save(path, quality, refinements=refinements)
            path.chmod(0o644)
            opened = lm.open(path)
            layers = [layer.content.decode_row(0, torch.float32) for layer in opened.cache.own_layers]
            expected[name] = {
                "stored": stored_digest(path),
                "tokens": len(opened.tokens),
                "layers": [figures([(k.numpy(), v.numpy()) for k, v in heads]) for heads in layers],
            }
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
