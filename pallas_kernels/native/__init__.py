"""CPU kernels in C++, called through `jax.ffi`; absent without a compiler.

Decides whether the extension that `setup.py` built beside this file can be used, and
registers its handlers. `status` says what was found: the instruction set in use, or why
there is none. Nothing is loaded before the first question.

The environment variable `QJAX_NATIVE` names an instruction set ("amx", "avx512",
"avxvnni", "avx2", "neon" or "plain") to use instead of the best, or is "off".
"amx-emulated" runs the code for AMX on plain arrays, for tests; nothing chooses it.
"""

import ctypes
import dataclasses
import functools
import importlib.machinery
import os
import re
from pathlib import Path

import jax

FOLDER = Path(__file__).parent
VARIABLE = "QJAX_NATIVE"
ISAS = ("amx", "avx512", "avxvnni", "avx2", "neon", "plain", "amx-emulated")
TARGETS = (
    "qjax_attention",
    "qjax_matmul",
    "qjax_self_attention",
    "qjax_self_attention_gradient",
    "qjax_stream_read",
    "qjax_trellis",
)
UNBUILT = "unbuilt.txt"
"""Written by `setup.py` when it could not build: the reason."""


@dataclasses.dataclass(frozen=True)
class Status:
    """Whether native kernels can run.

    Attributes:
      isa: the instruction set in use, or None.
      reason: why there is none; empty when there is one.
    """

    isa: str | None
    reason: str = ""

    @property
    def loaded(self) -> bool:
        """Whether calls can run."""
        return self.isa is not None

    def __str__(self) -> str:
        return f"native CPU kernels: {self.isa or f'absent, {self.reason}'}"


def status() -> Status:
    """What is available; loads and registers the extension the first time."""
    library, reason = _library()
    if library is None:
        return Status(None, reason)
    return Status(library.qjax_isa().decode())


def choose_isa(name: str) -> bool:
    """Makes later calls use another instruction set; for tests and comparisons.

    Args:
      name: one of `ISAS`, or "" for the best.

    Returns:
      Whether this machine has it; if not, nothing changes.
    """
    library, _ = _library()
    return library is not None and bool(library.qjax_choose_isa(name.encode()))


def find_library(folder: Path = FOLDER) -> Path | None:
    """The extension's file: this interpreter's build, else that of another."""
    names = [f"_kernels{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    own = [folder / name for name in names if (folder / name).exists()]
    # It is plain C, so one that another version of Python built serves as well.
    return next(iter(own + sorted(folder.glob("_kernels*.so"))), None)


def ffi_version(include: str) -> int | None:
    """`1000 major + minor` of the FFI of the running jaxlib, from its headers."""
    header = Path(include) / "xla" / "ffi" / "api" / "c_api.h"
    if not header.exists():
        return None
    text = header.read_text("utf-8")
    found = re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text)
    parts = {key: int(value) for key, value in found}
    if len(parts) != 2:
        return None
    return 1000 * parts["MAJOR"] + parts["MINOR"]


def load(folder: Path, include: str, wanted: str):
    """Opens the extension in a folder.

    Args:
      folder: where it was built.
      include: `jax.ffi.include_dir()`.
      wanted: an instruction set, "" for the best, or "off".

    Returns:
      The library and "", or None and the reason.
    """
    if wanted == "off":
        return None, f"{VARIABLE} is off"
    path = find_library(folder)
    if path is None:
        note = folder / UNBUILT
        built = note.read_text("utf-8").strip() if note.exists() else "not built"
        return None, f"{built}; install with a C++17 compiler in PATH"
    try:
        library = ctypes.CDLL(str(path))
        library.qjax_isa.restype = ctypes.c_char_p
        library.qjax_choose_isa.argtypes = [ctypes.c_char_p]
        version = library.qjax_ffi_version()
    except (OSError, AttributeError) as e:
        return None, f"{path.name} does not load: {e}"
    running = ffi_version(include)
    if running is None:
        return None, f"the FFI version of jaxlib is unknown: no headers in {include}"
    # The runtime's own refusal would make the whole CPU backend fail.
    if version // 1000 != running // 1000 or version > running:
        return None, (
            f"{path.name} was built for FFI {version // 1000}.{version % 1000}, "
            f"jaxlib has {running // 1000}.{running % 1000}; install again"
        )
    if wanted and not library.qjax_choose_isa(wanted.encode()):
        return None, f"{VARIABLE}={wanted!r}: this machine does not have it"
    return library, ""


@functools.cache
def _library():
    wanted = os.environ.get(VARIABLE, "")
    library, reason = load(FOLDER, jax.ffi.include_dir(), wanted)
    if library is not None:
        for target in TARGETS:
            capsule = jax.ffi.pycapsule(getattr(library, target))
            jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    return library, reason
