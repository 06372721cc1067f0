"""`make test-native`: the tests run the library that it built, and the sanitizers see what the kernels read."""

import subprocess
import sys
from pathlib import Path

import pytest

from steno.kernels import native

# a span that claims one token more than its tensors hold; every attempt ends in a process of its own
READ_PAST_THE_KEYS = """
import os, sys
from pathlib import Path
import torch
from steno.kernels import native
from steno.kernels.attention import DenseSpan, SpanTable, attend
from steno.kernels.attention.table import Column

native.LIBRARY_DIR = Path(sys.argv[1])
q, keys, values = torch.randn(1, 1, 1, 16), torch.randn(64, 16), torch.randn(64, 16)
for isa in native.available_isas():
    for past in (0, 1):
        table = SpanTable.build([[[DenseSpan(keys, values)]]], head_dim=16)
        table.entries[0, Column.TOKENS] += past
        child = os.fork()
        if not child:
            attend(q, table, scale=0.5, isa=isa, num_threads=1)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(isa, past, "stopped" if ended else "attended", flush=True)
"""


@pytest.fixture
def folder(pytestconfig: pytest.Config) -> Path:
    folder = pytestconfig.getoption("--sanitized-library")
    if folder is None:
        pytest.skip("the library is not a sanitized one; `make test-native` builds it")
    return folder.resolve()


def test_the_library_is_the_sanitized_one(folder):
    assert Path(native.library()._name).parent == folder
    assert hasattr(native.library(), "__asan_init"), "the library is not linked to the sanitizer of addresses"


def test_reads_past_the_keys_are_stopped(folder):
    call = [sys.executable, "-c", READ_PAST_THE_KEYS, str(folder)]
    ran = subprocess.run(call, capture_output=True, text=True)
    isas = native.available_isas()
    expected = [f"{isa} {past} {'stopped' if past else 'attended'}" for isa in isas for past in (0, 1)]
    assert ran.stdout.splitlines() == expected, ran.stderr
    assert ran.stderr.count("ERROR: AddressSanitizer: heap-buffer-overflow") == len(isas), ran.stderr
