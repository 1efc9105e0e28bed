"""Reading PyTorch `.bin` and `.pt` checkpoints without PyTorch.

A checkpoint of PyTorch 1.6 or later is a zip of stored members: `ROOT/data.pkl` says
which tensors there are, `ROOT/data/KEY` hold their bytes. The pickle goes through the
interpreter of `state_pickle`, which executes nothing; the bytes are views of the mapped
file, checked against their CRC-32 when a tensor is first read.

Accepted: a flat dict of dense tensors (float64/32/16, bfloat16, float8, integers,
bool), shared storages and any strides; or such a dict under `state_dict`. Refused: the
older formats (tar, bare pickle), TorchScript, sparse, quantized and meta tensors,
tensor subclasses, big-endian files, and anything the pickle asks for beyond that.
"""

import math
import os
from collections.abc import Mapping
from typing import Any, Self

import ml_dtypes
import numpy as np

from qjax.converters.state_pickle import TensorRef, parse_state
from qjax.errors import FormatError, SpecError, UnsupportedError
from qjax.io.archive import StoredZip
from qjax.io.files import MappedFile, shown
from qjax.io.safetensors_layout import check_names

MAX_PICKLE = 8 << 20


class TorchFile:
    """One open PyTorch checkpoint; the same methods as `SafetensorsFile`.

    Attributes:
      file: The mapped file underneath.
      tensors: Name to `TensorRef`, in the order of the checkpoint; to an array where
        the pickle holds the value itself (the settings of hqq's layers).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        resolved: str | os.PathLike[str] | None = None,
    ):
        """Open and validate `path`.

        Args:
          path: Regular file.
          resolved: Its real path, found before; opened without following another link.

        Raises:
          FormatError: Not a plain checkpoint, or damaged; nothing was executed.
          UnsupportedError: An older format, or big-endian.
          IntegrityError: The pickle's CRC-32 does not match.
          SpecError: The file cannot be opened.
        """
        _refuse_legacy(path, resolved)
        self._zip = StoredZip(path, resolved)
        self.file = self._zip.file
        self._where = shown(self.file.path)
        try:
            self._root = self._find_root()
            data = self._zip.read(f"{self._root}/data.pkl", MAX_PICKLE)
            state = parse_state(data, f"{self._where}: data.pkl")
            self.tensors = _flat(state, self._where)
            for name, ref in self.tensors.items():
                if not isinstance(ref, np.ndarray):
                    self._check(name, ref)
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def names(self) -> list[str]:
        """Return the tensor names in the order of the checkpoint."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._ref(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a tensor."""
        ref = self._ref(name)
        return ref.dtype if isinstance(ref, np.ndarray) else _dtype(ref.dtype)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as a read-only view of the mapped file.

        A tensor stored transposed or with gaps comes back as such a view, not
        contiguous.

        Raises:
          SpecError: No such tensor.
          IntegrityError: The CRC-32 of its storage does not match.
        """
        ref = self._ref(name)
        if isinstance(ref, np.ndarray):
            return ref
        dtype = _dtype(ref.dtype)
        key = self._member(ref)
        self._zip.check(key)
        member = self._zip.member(key)
        count = member.size // dtype.itemsize
        raw = dtype if dtype != np.bool_ else np.dtype(np.uint8)
        flat = self.file.array(member.start, raw, (count,))
        if dtype == np.bool_:
            if count and flat.max() > 1:
                raise FormatError(
                    f"{self._where}: tensor {name!r}: bool byte {flat.max()}, "
                    "expected 0 or 1"
                )
            flat = flat.view(np.bool_)
        if math.prod(ref.shape) == 0:
            return np.empty(ref.shape, dtype)
        strides = [s * dtype.itemsize for s in ref.strides]
        start = ref.offset * dtype.itemsize
        return np.ndarray(ref.shape, dtype, flat.view(np.uint8), start, strides)

    def release(self) -> None:
        """Give the pages of tensors read so far back; views stay valid."""
        self.file.release()

    def close(self) -> None:
        """Close the file; views handed out stay valid until dropped."""
        self._zip.close()

    def _ref(self, name: str) -> TensorRef | np.ndarray:
        try:
            return self.tensors[name]
        except KeyError:
            raise SpecError(f"{self._where}: no tensor {name!r}") from None

    def _member(self, ref: TensorRef) -> str:
        return f"{self._root}/data/{ref.storage.key}"

    def _find_root(self) -> str:
        """Return the one top-level folder, after checking what the archive is."""
        names = self._zip.members
        roots = {name.split("/")[0] for name in names}
        if len(roots) != 1:
            raise FormatError(
                f"{self._where}: a zip archive, but not a PyTorch checkpoint: expected "
                f"one folder, found {len(roots)}"
            )
        root = roots.pop()
        if f"{root}/data.pkl" not in names:
            raise FormatError(f"{self._where}: no {root}/data.pkl, not a checkpoint")
        order = f"{root}/byteorder"
        if order in names and self._zip.read(order, 16) != b"little":
            raise UnsupportedError(f"{self._where}: tensors are not little-endian")
        return root

    def _check(self, name: str, ref: TensorRef) -> None:
        """Check a tensor's window against its storage, and that against the file."""
        where = f"{self._where}: tensor {name!r}"
        item = _dtype(ref.dtype).itemsize
        member = self._zip.member(self._member(ref))
        declared = ref.storage.count * (item if ref.storage.dtype else 1)
        if member.size != declared:
            raise FormatError(
                f"{where}: its storage {ref.storage.key!r} holds {member.size} bytes, "
                f"the pickle declares {declared}"
            )
        if math.prod(max(n, 1) for n in ref.shape) * item >= 1 << 63:
            raise FormatError(f"{where}: shape {list(ref.shape)} is too large")
        count = member.size // item
        last = ref.offset
        if math.prod(ref.shape):
            steps = zip(ref.shape, ref.strides, strict=True)
            last += sum((n - 1) * stride for n, stride in steps) + 1
        if last > count or math.prod(ref.shape) > count:
            raise FormatError(
                f"{where}: shape {list(ref.shape)}, strides {list(ref.strides)} and "
                f"offset {ref.offset} pass the {count} elements of its storage"
            )


def load_torch(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return every tensor of a PyTorch checkpoint as NumPy views.

    The views keep the file mapped; each storage has been checked against its CRC-32.

    Args:
      path: `.bin`, `.pt` or `.pth` file of PyTorch 1.6 or later.

    Returns:
      Name to read-only array.

    Raises:
      QjaxError: As `TorchFile` and `TorchFile.read`.
    """
    with TorchFile(path) as file:
        return {name: file.read(name) for name in file.names()}


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _refuse_legacy(
    path: str | os.PathLike[str], resolved: str | os.PathLike[str] | None
) -> None:
    with MappedFile(path, resolved) as file:
        head = file.read(0, min(file.size, 512))
    if head[:4] == b"PK\x03\x04":
        return
    if head[:1] == b"\x80" or head[257:262] == b"ustar":
        raise UnsupportedError(
            f"{shown(path)}: the checkpoint format from before PyTorch 1.6 is not "
            "supported; load and save it again with a newer PyTorch"
        )
    raise FormatError(f"{shown(path)}: not a PyTorch checkpoint (not a zip archive)")


def _flat(state: Any, where: str) -> dict[str, TensorRef | np.ndarray]:
    """Return the flat dict of tensors in a parsed pickle."""
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise FormatError(
            f"{where}: holds a {type(state).__name__}, expected a dict of tensors"
        )
    if any(isinstance(value, Mapping) and "W_q" in value for value in state.values()):
        from qjax.converters.hqq_parts import flat_state

        flat = flat_state(state, where)  # hqq's qmodel.pt nests one dict per module
        check_names(flat, where)
        return flat
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, TensorRef):
            raise FormatError(
                f"{where}: entry {str(name)[:100]!a} is a {type(value).__name__}, "
                "expected a tensor; save the model's state_dict alone"
            )
    check_names(state, where)
    return dict(state)
