"""The native library: where it lies, which instruction sets it has, and what its functions answer."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import numpy as np

from steno.errors import BadArgument, KernelError, nearest

ISAS = ("portable", "avx2", "avx512", "vnni", "bf16")
"""In the order of the native numbers, slowest first."""

ABI_VERSION = 11
"""Must equal `steno_abi_version()`: the layout of the arguments of every function."""

LIBRARY_DIR = Path(__file__).parent


def why_missing() -> str | None:
    """Why the native library cannot be used and what to do about it; None where it can."""
    found = _load(LIBRARY_DIR)
    return found if isinstance(found, str) else None


def available_isas() -> list[str]:
    """The values of `isa` that this machine and this build can run."""
    found = _load(LIBRARY_DIR)
    return [] if isinstance(found, str) else [isa for i, isa in enumerate(ISAS) if found.steno_has_isa(i)]


def library() -> ctypes.CDLL:
    """The native library; raises `KernelError` where it is missing."""
    found = _load(LIBRARY_DIR)
    if isinstance(found, str):
        raise KernelError(f"the native library is missing: {found}")
    return found


def number_of_isa(isa: str | None) -> int:
    """The native number of an instruction set; None: -1, the best that this machine and this build can run."""
    if isa is None:
        return -1
    if isa not in ISAS:
        raise BadArgument(f"unknown isa {isa!r}; {nearest(isa, ISAS)}")
    return ISAS.index(isa)


def address(array: np.ndarray) -> ctypes.c_void_p:
    """Where the numbers of an array lie."""
    return ctypes.c_void_p(array.__array_interface__["data"][0])  # a fifth of the time of array.ctypes.data


def check_status(status: int, isa: str | None) -> None:
    """Raises what the result of a native function stands for."""
    if status == 1:
        raise KernelError(f"isa {isa!r} is not available on this machine.")
    if status == 2:
        raise BadArgument("page ids must lie within their span; got one outside.")
    if status:
        raise MemoryError("no memory for the scratch of a native kernel.")


@lru_cache(maxsize=4)
def _load(folder: Path) -> ctypes.CDLL | str:
    """The library in `folder`, or the reason why there is none."""
    # torch is imported first on purpose: the library then binds to its libgomp, and there is one pool of threads
    fix = "install a C++ compiler, then pip install --force-reinstall --no-deps --no-binary stenokv stenokv"
    found = sorted(folder.glob("_native*.so")) + sorted(folder.glob("_native*.pyd"))
    if not found:
        return f"it was not compiled when the package was installed; {fix}"
    try:
        native = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load ({error}); {fix}"
    version = native.steno_abi_version()
    if version != ABI_VERSION:
        return f"{found[0].name} has interface version {version}, not {ABI_VERSION}; {fix}"
    return native
