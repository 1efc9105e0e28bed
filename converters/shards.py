"""Which weight files a model directory has, and where its index may point.

A name from an index is data, not a path: it must be a plain file name, and the file it
resolves to must lie in the directory or, through the links of the Hub cache, among the
blobs of the same repository.
"""

import os
import re
from pathlib import Path

from qjax.errors import FormatError, SpecError
from qjax.io.files import shown
from qjax.io.json import read_object
from qjax.io.safetensors_layout import MAX_TENSORS

MAX_INDEX = 32 << 20
_SHARD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}\.(safetensors|bin)")
_NUMBERED = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state).*")
_PAIRS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def contained(directory: Path, name: str) -> Path:
    """Return the real path of a file in `directory`.

    Args:
      directory: Model directory.
      name: Plain file name in it.

    Returns:
      The path with all links resolved; open it without following another.

    Raises:
      FormatError: `name` is not a plain name, or the file lies elsewhere.
      SpecError: It does not exist.
    """
    if not name or name != os.path.basename(name) or name in (".", ".."):
        raise FormatError(f"{shown(directory)}: {name!a} is not a plain file name")
    root = os.path.realpath(directory)
    try:
        path = os.path.realpath(os.path.join(root, name), strict=True)
    except FileNotFoundError:
        raise SpecError(f"{shown(directory)}: no {name}, or a broken link") from None
    except OSError as error:
        raise SpecError(
            f"{shown(directory)}: {name} cannot be opened: {error.strerror}"
        ) from error
    homes = [root]
    for folder in (root, os.path.dirname(root)):  # the snapshot, or a folder in it
        above, name_above = os.path.split(os.path.dirname(folder))
        if name_above == "snapshots":
            homes.append(os.path.join(above, "blobs"))
    if os.path.dirname(path) not in homes:
        raise FormatError(
            f"{shown(directory)}: {name} is a link to {shown(path)}, outside the model "
            "directory; it was not opened. Copy the file into the directory"
        )
    return Path(path)


def find_shards(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """Return the weight files of a directory and its index, if it has one.

    Safetensors win over PyTorch files. Without an index a single file is taken.

    Args:
      directory: Model directory.

    Returns:
      (file names, tensor to file name or None).

    Raises:
      FormatError: The index is malformed, names a file that is absent or not allowed,
        or leaves out a numbered shard.
      SpecError: There are no weights, or no telling which file holds them.
    """
    there = sorted(os.listdir(directory))
    for single, index in _PAIRS:
        if index in there:
            listed = _read_index(directory, index)
            shards = sorted(set(listed.values()))
            _check_shards(directory, index, shards, there, single)
            return shards, listed
        if single in there:
            return [single], None
    for suffixes in ((".safetensors",), (".bin", ".pt", ".pth")):
        alone = [
            name
            for name in there
            if name.endswith(suffixes) and not _NOT_WEIGHTS.fullmatch(name)
        ]
        if len(alone) == 1 and not _NUMBERED.fullmatch(alone[0]):
            return alone, None
        if alone:
            raise SpecError(
                f"{shown(directory)}: several weight files and no index: "
                f"{', '.join(ascii(name) for name in alone[:5])}"
            )
    raise SpecError(
        f"{shown(directory)}: no weights; expected model.safetensors, "
        "model.safetensors.index.json or pytorch_model.bin"
    )


def _read_index(directory: Path, name: str) -> dict[str, str]:
    where = f"{shown(directory)}: {name}"
    real = contained(directory, name)
    index = read_object(
        directory / name, max_bytes=MAX_INDEX, max_depth=8, resolved=real
    )
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise FormatError(f"{where}: weight_map must be an object with entries")
    if len(listed) > MAX_TENSORS:
        raise FormatError(f"{where}: more than {MAX_TENSORS:,} tensors")
    suffix = ".bin" if ".bin." in name else ".safetensors"
    for shard in set(map(str, listed.values())):
        if (
            not _SHARD.fullmatch(shard)
            or _DEVICE.fullmatch(shard)
            or not shard.endswith(suffix)
        ):
            raise FormatError(
                f"{where}: {shard[:200]!a} is not a plain *{suffix} file name; it was "
                "not opened"
            )
    for tensor, shard in listed.items():
        if not isinstance(shard, str):
            raise FormatError(f"{where}: tensor {tensor[:200]!a} has no file name")
    return listed


def _check_shards(
    directory: Path, index: str, shards: list[str], there: list[str], single: str
) -> None:
    """Check that exactly the listed shards are there."""
    for shard in shards:
        if shard not in there:
            raise FormatError(
                f"{shown(directory)}: {index} lists {shard}, which is not there; the "
                "checkpoint is incomplete"
            )
    suffix = single[single.index(".") :]
    for name in there:
        numbered = _NUMBERED.fullmatch(name) and name.endswith(suffix)
        if (numbered or name == single) and name not in shards:
            raise FormatError(
                f"{shown(directory)}: {name} is not listed in {index}; remove one"
            )
