"""Builds the native kernels where a C++ compiler is there; without one the package installs all the same."""

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, LinkError

CSRC = Path("src/steno/kernels/csrc")
# no -march: each file of kernels names its own instruction set, and the best one is chosen at run time
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"]
# gcc warns about its own intrinsics
FLAGS += ["-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]

# no address is null, and ASan finds the others; checking each for null, too, doubles the compiler's time
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size,alignment"]
SANITIZERS += ["-fno-sanitize-recover=undefined"]
# Python's own flags have -fwrapv, which makes an overflow of signed numbers defined, and so nothing to report
SANITIZED = [*SANITIZERS, "-O0", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv"]


class BuildNative(build_ext):
    """Adds the flags, with OpenMP if the compiler has it; `--sanitize` builds for `make test-native`."""

    user_options: ClassVar = [*build_ext.user_options, ("sanitize", None, "stop at bad addresses, undefined behaviour")]
    boolean_options: ClassVar = [*build_ext.boolean_options, "sanitize"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = False

    def build_extension(self, ext: Extension) -> None:
        openmp = ["-fopenmp"] if self.compiles_openmp() else []
        if not openmp:
            print("notice: no OpenMP here; steno's native kernels will use one thread.")
        ext.extra_compile_args = FLAGS + openmp
        # symbol tables would be most of the library
        ext.extra_link_args = [*openmp, "-Wl,-s"] if sys.platform == "linux" else openmp
        if self.sanitize:
            ext.optional = False
            ext.extra_compile_args += SANITIZED
            ext.extra_link_args = openmp + SANITIZERS
        self.compile_in_parallel(ext)
        super().build_extension(ext)

    def compile_in_parallel(self, ext: Extension) -> None:
        """Compiles one file a core; what is left of the extension is to link the objects."""

        def compile_one(source: str) -> list[str]:
            folders = [*self.include_dirs, *ext.include_dirs]
            return self.compiler.compile([source], output_dir=self.build_temp, include_dirs=folders,
                                         extra_postargs=ext.extra_compile_args)  # fmt: skip

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for objects in threads.map(compile_one, ext.sources):
                ext.extra_objects += objects
        ext.sources = []

    def compiles_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(objects, "probe", output_dir=folder, extra_postargs=["-fopenmp"])
            except (BaseError, CompileError, LinkError):
                return False
        return True


native = Extension(
    "steno.kernels._native",
    sources=[
        str(CSRC / f"{name}.cpp")
        # those that take longest first
        for name in (
            "vnni",
            "bf16",
            "avx512",
            "avx2",
            "portable",
            "dispatch",
            "dense",
            "encode",
            "gather",
            "rans",
            "bytes",
            "frame",
        )
    ],
    depends=[str(path) for path in [*sorted(CSRC.glob("*.h")), *sorted(CSRC.glob("*.inl"))]],
    language="c++",
    optional=True,  # a compiler that is missing or fails is a warning
)

setup(package_dir={"": "src"}, ext_modules=[native], cmdclass={"build_ext": BuildNative})
