"""Training files: which ones, and the records in them.

A record is what one line of JSONL, one row of parquet or one text file holds. Every
file has one layout, found from its first record:

    messages       `messages`, a conversation; `tools` may stand beside it
    prompt         `prompt` and `completion`, two texts or two parts of a conversation
    instruction    `instruction`, `output` and an optional `input`, as Alpaca has them
    text           one text, in the field that the settings name

Refuses: records that fit no layout or another than the file's first, lines above
`LINE_LIMIT`, broken or ambiguous JSON, text that is not UTF-8 or holds NUL. Errors name
file and line.
"""

import dataclasses
import glob
import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qjax.errors import FormatError, MissingExtraError, SpecError
from qjax.io.json import parse_object

KINDS = ("jsonl", "parquet", "text")
LINE_LIMIT = 64 * 1024 * 1024
_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_LAYOUTS = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
}
_COLUMNS = (
    "messages",
    "tools",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
)
_SPACE = b" \t\r\n"


class Place(NamedTuple):
    """Where a record stands: file, and line or row from 1 (0: the whole file)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


class Record(NamedTuple):
    """One record.

    Attributes:
      place: Where it stands.
      layout: "messages", "prompt", "instruction", "text", or "document", a text file.
      fields: Its values by name; those of a document are `{"text": ...}`.
    """

    place: Place
    layout: str
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """A file to read.

    Attributes:
      path: Its path.
      kind: "jsonl", "parquet" or "text".
      sha256: Digest of its bytes.
    """

    path: str
    kind: str
    sha256: str


def find_sources(path: str | Sequence[str], kind: str = "auto") -> list[Source]:
    """Returns the files that paths and patterns name, those of a pattern sorted.

    Args:
      path: A path or pattern (`*`, `?`, `[...]`, `**`), or several.
      kind: Kind of all of them; "auto" goes by the ending of each.

    Raises:
      SpecError: Nothing is there, or the kind cannot be told.
    """
    found = []
    for name in [path] if isinstance(path, str) else path:
        paths = [name]
        if not os.path.exists(name) and glob.has_magic(name):
            paths = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        if not paths or not os.path.exists(paths[0]):
            raise SpecError(f"data: {name!r} names no file; check the path")
        if os.path.isdir(paths[0]):
            pattern = os.path.join(name, "*.jsonl")
            raise SpecError(
                f"data: {name!r} is a folder; name files, as in {pattern!r}"
            )
        found += [_source(each, kind) for each in paths]
    if not found:
        raise SpecError("data: no path given; expected at least one file")
    return found


def read_records(source: Source, field: str = "text") -> Iterator[Record]:
    """Yields the records of a file.

    Args:
      source: One that `find_sources` returned.
      field: Name of the field with the text of layout "text".

    Raises:
      FormatError: A record is broken or another layout's; see the module's header.
      MissingExtraError: Parquet, and pyarrow is not installed.
    """
    if source.kind == "text":
        text = _document(source.path)
        yield Record(Place(source.path, 0), "document", {"text": text})
        return
    rows = _lines(source.path)
    if source.kind == "parquet":
        rows = _rows(source.path, (*_COLUMNS, field))
    layout = None
    for place, fields in rows:
        own = _layout(fields, field, place)
        if layout is None:
            layout = own
        if own != layout:
            raise FormatError(
                f"{place}: the record has layout {own!r}, those before it {layout!r}; "
                "keep records of different layouts in files of their own"
            )
        yield Record(place, own, fields)
    if layout is None:
        raise FormatError(f"{source.path}: holds no records; expected at least one")


def string_field(
    fields: Mapping[str, Any], name: str, place: Any, *, filled: bool = False
) -> str:
    """Returns a field that must be a string, and not blank if `filled`.

    Raises:
      FormatError: It is not, or holds NUL.
    """
    value = fields.get(name)
    if not isinstance(value, str):
        raise FormatError(
            f"{place}: field {name!r} is {type(value).__name__}, expected a string"
        )
    if filled and not value.strip():
        raise FormatError(
            f"{place}: field {name!r} is empty, so nothing is learned; fill it in or "
            "remove the record"
        )
    _check_text(value, f"{place}: field {name!r}")
    return value


def _source(path: str, kind: str) -> Source:
    if kind == "auto":
        ending = os.path.splitext(path)[1].lower()
        if ending not in _ENDINGS:
            raise SpecError(
                f"{path}: cannot tell what the ending {ending!r} holds; set kind to "
                f"one of {KINDS}, or use an ending of {', '.join(_ENDINGS)}"
            )
        kind = _ENDINGS[ending]
    with _opened(path) as file:
        return Source(path, kind, hashlib.file_digest(file, "sha256").hexdigest())


def _opened(path: str) -> io.BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None


def _document(path: str) -> str:
    """Returns the text of a file."""
    with _opened(path) as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path}: not UTF-8 at byte {error.start}; convert it, as with iconv"
        ) from None
    if not text.strip():
        raise FormatError(f"{path}: the file is empty; expected text")
    _check_text(text, path)
    return text


def _check_text(text: str, where: str) -> None:
    if "\0" in text:
        raise FormatError(
            f"{where}: holds a NUL character at character {text.index(chr(0))}; it is "
            "binary or damaged, remove them"
        )


def _lines(path: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yields the objects of a JSONL file; blank lines are none."""
    with _opened(path) as file:
        number = 0
        while line := file.readline(LINE_LIMIT + 1):
            number += 1
            place = Place(path, number)
            if len(line) > LINE_LIMIT:
                raise FormatError(
                    f"{place}: the line is longer than {LINE_LIMIT:,} bytes; is this "
                    "JSONL, one object a line?"
                )
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
                if line.lstrip(_SPACE).startswith(b"["):
                    raise FormatError(
                        f"{place}: the file is one JSON array; write one object a "
                        "line, as `jq -c '.[]'` does"
                    )
            if line.strip(_SPACE):
                yield place, parse_object(line, str(place), max_bytes=LINE_LIMIT)


def _rows(path: str, columns: Sequence[str]) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yields the rows of a parquet file: those columns, without what is null."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError(
            'parquet files need pyarrow; run: pip install "qjax-llm[train]"'
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in dict.fromkeys(columns) if name in names]
            if not wanted:
                raise FormatError(f"{path}: {_expected(names, columns[-1])}")
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(path, number), _without_nulls(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise FormatError(f"{path}: not valid parquet: {reason}") from None


def _without_nulls(value: Any) -> Any:
    """Returns `value` without the keys that Arrow adds to make structs alike."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _layout(fields: dict[str, Any], field: str, place: Place) -> str:
    """Returns the layout of a record; a field that is not "text" was asked for."""
    if field != "text" and field in fields:
        return "text"
    for layout, names in _LAYOUTS.items():
        if all(name in fields for name in names):
            return layout
    if field in fields:
        return "text"
    raise FormatError(f"{place}: {_expected(list(fields), field)}")


def _expected(names: Sequence[str], field: str) -> str:
    layouts = " or ".join("+".join(names) for names in _LAYOUTS.values())
    return (
        f"the record has the fields {list(names)!r:.200}; expected {layouts}, or "
        f"{field!r} (the setting `field`)"
    )
