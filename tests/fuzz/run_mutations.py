"""Reads mutated `.steno` files, and says what came of them: `python tests/fuzz/run_mutations.py --count 100000`.

A changed file must raise an error of ours, or, where its digests were not made right again, serve what the whole one serves. No
other exception, no file over a second of CPU time, no allocation above four times what it declares. Prints a JSON object.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import steno
from fuzz.mutations import ACCIDENTS, INTENT
from fuzz.reader import Reader

LIMIT_S = 1.0
ROOM_BYTES = 4 << 30
"""Address space beside what the process has; an allocation of more fails, and so does the run."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", type=int, default=10, help="measure the memory of every so many files")
    parser.add_argument("--out", type=Path, help="folder for files that failed")
    arguments = parser.parse_args()
    rng, outcomes, failures, slowest = random.Random(arguments.seed), collections.Counter[str](), [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(Path(folder))
    whole = [reader.serve(data)[0] for data in reader.files]
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        limit = pages * resource.getpagesize() + ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in range(arguments.count):
        which = rng.randrange(len(reader.files))
        mutation = rng.choice([rng.choice(ACCIDENTS), rng.choice(INTENT)])
        data = mutation(rng, reader.files[which], reader.files[which - 1])
        started, problem = time.process_time(), ""
        try:
            served, _ = reader.serve(data)
            outcome = "same" if served == whole[which] else "other"
            if outcome == "other" and mutation in ACCIDENTS and data not in reader.files:
                problem = "served something else without an error"
        except steno.StenoError as error:
            outcome = type(error).__name__
        except BaseException as error:
            outcome, problem = "crash", f"{type(error).__name__}: {error}"
        taken = time.process_time() - started
        slowest = max(slowest, taken)
        if taken > LIMIT_S:
            problem = f"took {taken:.2f} s"
        if number % arguments.measure == 0 and not problem:
            peak, allowed = reader.peak_bytes(data)
            problem = f"allocated {peak} bytes of {allowed}" if peak > allowed else ""
        outcomes[outcome] += 1
        if problem:
            failures.append({"number": number, "mutation": mutation.__name__, "problem": problem[:300]})
            if arguments.out:
                arguments.out.mkdir(parents=True, exist_ok=True)
                (arguments.out / f"{arguments.seed}-{number}.steno").write_bytes(data)
    told = {
        "count": arguments.count,
        "outcomes": dict(outcomes),
        "slowest_s": round(slowest, 4),
        "failures": failures[:20],
    }
    print(json.dumps(told | {"num_failures": len(failures)}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
