"""The qjax artifact: a directory of safetensors parts under one manifest.

    qjax.json               manifest: format version, recipe, spec and report of each
                            tensor, SHA-256 of each stored array and copied file, and
                            of the source
    embed.safetensors       embeddings
    layer-0000.safetensors  one decoder layer each
    final.safetensors       last norm and head
    config.json, tokenizer  copied from the source

Parts are written one at a time, so a writer holds one layer; a part carries its own
specs and reports in its header, so an interrupted run continues from the parts that are
complete. The manifest is written last and contains nothing that changes between two
identical runs: same source, recipe and versions give the same bytes.

Readers verify every array against its digest before using it and refuse a damaged file
by file and tensor name. Nothing in an artifact is executed.
"""

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax.converters.shards import contained
from qjax.errors import FormatError, IntegrityError, SpecError
from qjax.io.atomic import write_bytes
from qjax.io.files import content_of, sha256_file, shown
from qjax.io.json import encode_object, parse_object, read_object
from qjax.io.safetensors import SafetensorsFile, SafetensorsWriter
from qjax.io.staging import StagingDirectory
from qjax.specs import describe, rebuild
from qjax.tensor import QuantizedTensor

MANIFEST = "qjax.json"
FORMAT_VERSION = 1
_MAX_MANIFEST = 64 << 20
_MAX_COPIED = 256 << 20


def part_name(layer: int | None, first: bool) -> str:
    """File name of a part: embeddings, layer `i`, or what follows the layers."""
    if layer is None:
        return "embed.safetensors" if first else "final.safetensors"
    return f"layer-{layer:04d}.safetensors"


def versions() -> dict[str, str]:
    """Versions that influence stored bytes."""
    names = ("qjax-llm", "jax", "jaxlib", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


class ArtifactWriter:
    """Writes an artifact part by part into a staging directory.

    Use as a context manager; leaving without `finish` keeps complete parts for a later
    run with the same identity.

    Attributes:
      done: names of parts that an earlier, interrupted run completed.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        identity: dict[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = True,
    ):
        """Opens the staging directory; see `StagingDirectory`.

        Args:
          target: the artifact.
          identity: what the work is; only equal work is resumed.
          overwrite: replace an existing model directory.
          resume: keep complete parts of an interrupted run.
        """
        identity = {**identity, "versions": versions(), "format": FORMAT_VERSION}
        self._stage = StagingDirectory(target, identity=identity, overwrite=overwrite)
        if not resume:
            for name in self._stage.files():
                (self._stage.path / name).unlink()
        self.done = {n for n in self._stage.files() if n.endswith(".safetensors")}
        self._digests: dict[str, dict[str, str]] = {}

    def __enter__(self) -> "ArtifactWriter":
        self._stage.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stage.__exit__(*exc)

    def write(
        self, name: str, params: Mapping[str, Any], reports: Mapping[str, Any]
    ) -> None:
        """Writes one part.

        Args:
          name: file name of the part.
          params: parameters by path: arrays or quantized tensors.
          reports: JSON-ready report of each parameter, by path.
        """
        entries: dict[str, Any] = {}
        arrays: dict[str, Any] = {}
        for path, leaf in params.items():
            spec, own = describe(path, leaf)
            entries[path] = {"spec": spec, "report": reports.get(path, {})}
            arrays.update(own)
        layout = {n: (tuple(a.shape), np.dtype(a.dtype)) for n, a in arrays.items()}
        metadata = {"qjax": json.dumps(entries, sort_keys=True)}
        with self._stage.write(name) as file:
            writer = SafetensorsWriter(file, layout, metadata)
            for array_name, array in arrays.items():
                writer.write(array_name, np.asarray(array))
            self._digests[name] = writer.finish()

    @contextlib.contextmanager
    def read(self, name: str) -> Iterator[dict[str, Any]]:
        """The parameters of a part written before, as views valid inside `with`."""
        with SafetensorsFile(self._stage.path / name) as part:
            entries = _entries(part, name)
            yield {p: rebuild(p, e["spec"], part.read) for p, e in entries.items()}

    def reports(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Path and report of every parameter written so far, in file order."""
        for name in self._parts():
            with SafetensorsFile(self._stage.path / name) as part:
                for path, entry in _entries(part, name).items():
                    yield path, entry["report"]

    def finish(self, header: dict[str, Any], copied: Mapping[str, Any]) -> None:
        """Copies files, writes the manifest and moves the artifact into place.

        Args:
          header: manifest fields beside files and tensors.
          copied: config and tokenizer files by name: paths or contents.
        """
        files: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for name in self._parts():
            path = self._stage.path / name
            with SafetensorsFile(path) as part:
                known = self._digests.get(name)
                digests = known or {n: part.sha256(n) for n in part.names()}
                for tensor, entry in _entries(part, name).items():
                    tensors[tensor] = {"file": name, **entry}
            arrays = dict(sorted(digests.items()))
            files[name] = {"size": path.stat().st_size, "arrays": arrays}
        for name, source in copied.items():
            data = content_of(source, _MAX_COPIED)
            write_bytes(self._stage.path / name, data, overwrite=True)
            digest = sha256_file(self._stage.path / name)
            files[name] = {"size": len(data), "sha256": digest}
        manifest = {"format_version": FORMAT_VERSION, "versions": versions(), **header}
        manifest |= {"files": files, "tensors": tensors}
        write_bytes(
            self._stage.path / MANIFEST, encode_object(manifest), overwrite=True
        )
        self._stage.commit()

    def _parts(self) -> list[str]:
        names = (n for n in self._stage.files() if n.endswith(".safetensors"))
        order = {"embed.safetensors": 0, "final.safetensors": 2}
        return sorted(names, key=lambda n: (order.get(n, 1), n))


class Artifact:
    """An open qjax artifact.

    Attributes:
      directory: where it lies.
      manifest: parsed `qjax.json`.
      config: parsed `config.json`.
    """

    def __init__(self, directory: str | os.PathLike[str], *, verify: bool = True):
        """Opens an artifact; arrays are read and verified later, part by part.

        Args:
          directory: the artifact.
          verify: check digests while reading.

        Raises:
          FormatError: the manifest is damaged or of a newer version.
          IntegrityError: a file is missing, has another size, or a copied file changed.
        """
        self.directory = Path(directory)
        self._verify = verify
        path = contained(self.directory, MANIFEST)
        self.manifest = read_object(path, max_bytes=_MAX_MANIFEST)
        where = shown(path)
        version = self.manifest.get("format_version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise FormatError(
                f"{where}: format version {version!r}, this qjax reads 1 to "
                f"{FORMAT_VERSION}; upgrade qjax"
            )
        for key in ("files", "tensors"):
            if not isinstance(self.manifest.get(key), dict):
                raise FormatError(f"{where}: {key!r} is missing or not an object")
        self.files = {n: self._check_file(n, f) for n, f in self._items("files")}
        if "config.json" not in self.files:
            raise FormatError(f"{where}: lists no config.json")
        self.config = read_object(self.files["config.json"])

    def _items(self, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, entry in self.manifest[key].items():
            if not isinstance(entry, dict):
                raise FormatError(f"{MANIFEST}: entry {name!r} is not an object")
            yield name, entry

    def _check_file(self, name: str, entry: dict[str, Any]) -> Path:
        try:
            path = contained(self.directory, name)
        except SpecError as error:
            raise IntegrityError(
                f"{error}; the manifest lists it: copy the artifact again"
            ) from None
        size = path.stat().st_size
        if size != entry.get("size"):
            raise IntegrityError(
                f"{shown(path)}: {size} bytes, the manifest says {entry.get('size')}; "
                "the file is damaged, copy the artifact again"
            )
        digest = entry.get("sha256")
        if self._verify and digest is not None and sha256_file(path) != digest:
            raise IntegrityError(
                f"{shown(path)}: content differs from the digest in the manifest; the "
                "file is damaged, copy the artifact again"
            )
        return path

    def parts(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields file name and parameters of each part; arrays are mapped views.

        Raises:
          FormatError: a spec does not fit its arrays.
          IntegrityError: an array differs from its digest; names file and tensor.
        """
        grouped: dict[str, dict[str, Any]] = {}
        for path, entry in self._items("tensors"):
            file = entry.get("file")
            if file not in self.files:
                raise FormatError(f"{MANIFEST}: tensor {path!r} is in no listed file")
            grouped.setdefault(file, {})[path] = entry.get("spec")
        for file, specs in grouped.items():
            with SafetensorsFile(self.files[file]) as part:
                read = self._reader(file, part)
                yield file, {p: rebuild(p, s, read) for p, s in specs.items()}

    def _reader(self, file: str, part: SafetensorsFile) -> Callable[[str], Any]:
        digests = self.manifest["files"][file].get("arrays", {})

        def read(name: str) -> np.ndarray:
            if name not in part.tensors:
                raise FormatError(
                    f"{file}: no array {name!r}, which the manifest lists"
                )
            if self._verify and part.sha256(name) != digests.get(name):
                raise IntegrityError(
                    f"{file}: array {name!r} differs from its digest in the manifest; "
                    "the file is damaged, copy the artifact again"
                )
            return part.read(name)

        return read


def _entries(part: SafetensorsFile, name: str) -> dict[str, Any]:
    text = part.metadata.get("qjax")
    if text is None:
        raise FormatError(f"{name}: was not written by qjax")
    return parse_object(text.encode(), name, max_bytes=_MAX_MANIFEST)


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a qjax artifact."""
    return (Path(path) / MANIFEST).is_file()


def tensor_report(path: str, leaf: Any) -> dict[str, Any]:
    """What is known of a stored parameter without its original."""
    if isinstance(leaf, QuantizedTensor):
        return {
            "format": leaf.format.name,
            "bits_per_weight": leaf.bits_per_weight,
            "shape": list(leaf.shape),
            "nbytes": leaf.nbytes,
        }
    dtype = np.dtype(leaf.dtype)
    return {
        "format": dtype.name,
        "bits_per_weight": 8.0 * dtype.itemsize,
        "shape": list(leaf.shape),
        "nbytes": int(np.prod(leaf.shape, dtype=np.int64)) * dtype.itemsize,
    }
