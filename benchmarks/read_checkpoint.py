"""Time and memory of streaming a checkpoint from disk.

Command:   python benchmarks/read_checkpoint.py
Hardware:  any CPU; needs 1.1 GB of disk. About 10 seconds.
Measures:  a synthetic 1 GiB safetensors model, 32 layers of 32 MiB in two shards: peak
           memory beyond the start while writing, opening, reading every layer with and
           without `release` after each, and digesting the content.
Expected:  one layer (about 33 MiB) for writing and for reading with `release`; about
           `WINDOW` plus a layer (290 MiB) without; 8 MiB for the digest.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qjax.converters.huggingface import Checkpoint, open_checkpoint, write_checkpoint

LAYERS, SIDE = 32, 4096


class Layer:
    """A layer that exists only while it is converted."""

    shape, dtype = (SIDE, SIDE), np.dtype(np.float16)

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        """Return fresh, distinct pages."""
        return np.ones(self.shape, self.dtype)


def resident(field: str) -> float:
    """Return a memory field of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 1024 for x in lines if x.startswith(field + ":"))


def measure(what: str, run: Callable[[], object]) -> None:
    """Print the time of `run` and its peak memory beyond the start."""
    Path("/proc/self/clear_refs").write_text("5")
    before, started = resident("VmRSS"), time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    peak = resident("VmHWM") - before
    print(f"{what:28s} {seconds:7.3f} s   peak +{peak:6.1f} MiB")


def stream(checkpoint: Checkpoint, release: bool) -> None:
    """Read every byte of every layer."""
    for name in checkpoint.names():
        checkpoint.read(name).view(np.uint16).max()
        if release:
            checkpoint.release()


def main() -> None:
    """Run the measurements in a temporary directory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        layers = {f"layers.{i}.weight": Layer() for i in range(LAYERS)}
        write = lambda: write_checkpoint(path, {}, layers, shard_bytes=600 << 20)  # noqa: E731
        measure("write 1 GiB", write)
        measure("open", lambda: open_checkpoint(path).close())
        with open_checkpoint(path) as checkpoint:
            measure("read, release each layer", lambda: stream(checkpoint, True))
            measure("read, no release", lambda: stream(checkpoint, False))
            measure("digest of the content", checkpoint.source_digest)


if __name__ == "__main__":
    main()
