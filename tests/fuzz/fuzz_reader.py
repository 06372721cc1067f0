"""Coverage-guided fuzzing of the reader of `.steno` files with atheris (libFuzzer for Python).

    pip install atheris
    python tests/fuzz/fuzz_reader.py build/corpus -max_total_time=3600 -timeout=5 -rss_limit_mb=16000

atheris itself keeps about 18 kB of each input, hence the limit. The corpus is begun with valid files of a tiny model. What
the fuzzer makes is read twice: as it is, and with its header and chunks signed anew, so that changes get past the digests.
Everything but an error of ours is a finding; libFuzzer then writes the input to `crash-…` and
`python tests/fuzz/fuzz_reader.py crash-…` shows it again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import atheris

with atheris.instrument_imports(include=["steno.codec", "steno.recipe"], enable_loader_override=False):
    import steno
    import steno.codec.cache
    import steno.codec.container

from fuzz.mutations import signed
from fuzz.reader import Reader
from steno.codec.container import ALIGNMENT, MAGIC, PREFIX, digest

with tempfile.TemporaryDirectory() as _folder:
    READER = Reader(Path(_folder))
WHOLE = {READER.serve(data)[0] for data in READER.files}


def resigned(data: bytes) -> bytes | None:
    """The same file with all digests right, as far as its header can be read."""
    if len(data) < PREFIX.size or data[:8] != MAGIC:
        return None
    length = PREFIX.unpack(data[: PREFIX.size])[3]
    if length > len(data) - PREFIX.size:
        return None
    body = data[-(-(PREFIX.size + length) // ALIGNMENT) * ALIGNMENT :]
    try:
        header = json.loads(data[PREFIX.size : PREFIX.size + length])
        for entry in [header["tables"], *header["chunks"]]:
            offset, size = entry[-3], entry[-2]
            entry[-1] = digest(body[offset : offset + size])
        return signed(header, body)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, AttributeError):
        return None


def read(data: bytes) -> str | None:
    try:
        return READER.serve(data)[0]
    except steno.StenoError:
        return None


def test_one_input(data: bytes) -> None:
    served = read(data)
    own = resigned(data)
    if served is not None and served not in WHOLE and own != data:
        raise AssertionError("a file whose digests are wrong was served")
    if own is not None:
        read(own)


def main() -> None:
    folders = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    if folders and (folders[0].is_dir() or not folders[0].exists()):
        folders[0].mkdir(parents=True, exist_ok=True)
        for i, data in enumerate(READER.files):
            (folders[0] / f"valid-{i}.steno").write_bytes(data)
    atheris.Setup([*sys.argv, f"-max_len={2 * max(map(len, READER.files))}"], test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
