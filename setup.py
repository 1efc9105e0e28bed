"""Builds the native CPU kernels; an install without a compiler goes on without them.

Everything else about the package is in pyproject.toml. The headers of XLA's FFI come
with jaxlib. When the extension cannot be built the reason is kept in
`qjax/pallas_kernels/native/unbuilt.txt`, from where `qjax.ops.explain` reports it.
"""

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = "pallas_kernels/native"


def include_dir():
    """Folder of the FFI headers, found without importing jax."""
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or spec.origin is None:
        raise RuntimeError("jaxlib, whose headers it needs, was absent at build time")
    return str(Path(spec.origin).parent / "include")


class Build(build_ext):
    """`build_ext` that may fail and then says why."""

    def run(self):
        """Builds, or leaves the reason where the extension would be."""
        reason = ""
        try:
            self.include_dirs = None
            for extension in self.extensions:
                extension.extra_compile_args = [
                    "-std=c++17",
                    *([] if "-O" in os.environ.get("CXXFLAGS", "") else ["-O3"]),
                    "-g0",  # Python's own flags ask for debug information
                    "-DNDEBUG",
                    "-fvisibility=hidden",
                    "-fno-math-errno",
                    "-fno-trapping-math",
                    "-Wextra",
                    "-Wno-uninitialized",  # GCC's own intrinsics
                    "-Wno-maybe-uninitialized",
                    f"-isystem{include_dir()}",
                ]
            super().run()
        except Exception as e:  # whatever it is, the rest of the package works
            lines = str(e).strip().splitlines()
            reason = f"not built: {lines[0] if lines else type(e).__name__}"
            self.extensions = []
        for folder in self.folders():
            note = folder / "unbuilt.txt"
            note.unlink(missing_ok=True)
            if reason:
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(reason + "\n", "utf-8")

    def build_extensions(self):
        """Compiles the sources side by side: there is one per instruction set."""
        one = self.compiler.compile

        def compile_all(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: one([source], **options), sources)
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile_all
        super().build_extensions()

    def folders(self):
        """Where the extension belongs: the checkout in place, else the build folder."""
        if self.inplace:
            return [Path(NATIVE)]
        return [Path(self.build_lib) / "qjax" / NATIVE]


setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        Extension(
            "qjax.pallas_kernels.native._kernels",
            sorted(map(str, Path(NATIVE).glob("*.cc"))),
            depends=sorted(map(str, Path(NATIVE).glob("*.h"))),
            language="c++",
            optional=False,
        )
    ],
)
