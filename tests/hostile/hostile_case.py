"""What a hostile case is, and the small builders that several families share."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Target = str | Path
Content = bytes | Callable[[], bytes]


@dataclass(frozen=True)
class Case:
    """One bad input, and the error that every target of it must raise.

    Attributes:
      name: Unique id.
      opener: Key of `hostile_child.OPENERS`.
      build: Writes files into an empty directory and returns what to open.
      error: Class name of the error; None when the input is valid and must open.
      message: Text that the message must contain.
    """

    name: str
    opener: str
    build: Callable[[Path], Target | list[Target]]
    error: str | None = "FormatError"
    message: str = ""


def file_of(name: str, data: Content) -> Callable[[Path], Target]:
    """A builder that writes one file (large content is given as a function)."""

    def build(folder: Path) -> Target:
        (folder / name).write_bytes(data() if callable(data) else data)
        return folder / name

    return build


def files_of(suffix: str, variants: list[bytes]) -> Callable[[Path], list[Target]]:
    """A builder that writes many files, one per variant."""

    def build(folder: Path) -> list[Target]:
        for i, data in enumerate(variants):
            (folder / f"{i}{suffix}").write_bytes(data)
        return [folder / f"{i}{suffix}" for i in range(len(variants))]

    return build


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with any header: an object, text or bytes."""
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    """A header entry, unchecked."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def model(folder: Path, config: Any = None, **files: bytes) -> Path:
    """A model directory: config.json and files, whose `__` stand for dots."""
    config = {"model_type": "llama"} if config is None else config
    raw = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "config.json").write_bytes(raw)
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def special_files(folder: Path, suffix: str) -> list[Target]:
    """Things that are not regular files."""
    (folder / f"directory{suffix}").mkdir()
    os.mkfifo(folder / f"fifo{suffix}")
    (folder / f"zero{suffix}").symlink_to("/dev/zero")
    return [folder / f"{kind}{suffix}" for kind in ("directory", "fifo", "zero")]


def broken_links(folder: Path, suffix: str) -> list[Target]:
    """Paths that cannot be opened at all."""
    (folder / f"loop{suffix}").symlink_to(folder / f"loop{suffix}")
    (folder / f"dangling{suffix}").symlink_to(folder / "nowhere")
    return [
        folder / f"loop{suffix}",
        folder / f"dangling{suffix}",
        folder / f"absent{suffix}",
        folder / f"a\nnew line{suffix}",
        os.fsdecode(os.fsencode(folder) + b"/\xff\xfe" + suffix.encode()),
        f"{folder}/nul\0byte{suffix}",
        folder / ("x" * 5000),
    ]


FOREIGN = [
    b"",
    *(b"\0" * n for n in range(1, 16)),
    b"PK\x03\x04" + b"\0" * 60,
    b"\x80\x02}q\0." + b"\0" * 20,
    b"<!DOCTYPE html><html><body>404</body></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    b"\x1f\x8b\x08" + b"\0" * 30,
    b"GGUF\x03\0\0\0" + b"\0" * 30,
    b"\xff" * 64,
    b"\x89PNG\r\n\x1a\n" + b"\0" * 30,
]
