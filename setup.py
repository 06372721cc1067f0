"""Builds the native kernels where a C++ compiler is there; without one the package installs all the same."""

import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("src/steno/kernels/csrc")
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]


class OptionalBuild(build_ext):
    """Compiles the library; a compiler that is missing or fails is a notice, not an error."""

    def build_extension(self, ext: Extension) -> None:
        ext.extra_compile_args = list(FLAGS)
        if self.compiles_openmp():
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args = ["-fopenmp"]
        else:
            print("notice: the compiler has no OpenMP; steno's native kernels will use one thread.")
        try:
            super().build_extension(ext)
        except Exception as error:
            print(f"notice: steno's native kernels were not built, attention will run in plain torch, slowly: {error}")

    def compiles_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(objects, str(Path(folder) / "probe"), extra_postargs=["-fopenmp"])
            except Exception:
                return False
        return True

    def copy_extensions_to_source(self) -> None:
        """With --inplace: copy what was built, and only that."""
        self.extensions = [ext for ext in self.extensions if Path(self.get_ext_fullpath(ext.name)).exists() or self.built(ext)]
        super().copy_extensions_to_source()

    def built(self, ext: Extension) -> bool:
        return (Path(self.build_lib) / self.get_ext_filename(ext.name)).exists()


native = Extension(
    "steno.kernels._native",
    sources=[str(CSRC / name) for name in ("dispatch.cpp", "portable.cpp", "avx2.cpp", "avx512.cpp")],
    depends=[str(path) for path in sorted(CSRC.glob("*.h")) + sorted(CSRC.glob("*.inl"))],
    language="c++",
)

setup(ext_modules=[native], cmdclass={"build_ext": OptionalBuild})
