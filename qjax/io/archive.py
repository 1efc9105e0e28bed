"""Zip archives whose members are stored uncompressed, read in place.

Nothing is ever extracted: members are byte ranges of the mapped file. Refused: zip
archives with compressed or encrypted members, a name given twice, a local header that
disagrees with the central directory, absolute or climbing names, members that overlap
or pass the end, bytes before the first or after the last record, and more than
100,000 members. The directory is at most 32 MB, so opening costs a bounded amount.

Reference: PKWARE APPNOTE 6.3.10, sections 4.3 and 4.5.
"""

import os
import struct
from dataclasses import dataclass
from typing import Self

from qjax.errors import FormatError, IntegrityError
from qjax.io.files import MappedFile, shown

MAX_MEMBERS = 100_000
MAX_DIRECTORY = 32 << 20

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_LOCATOR64 = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_FLAGS_ALLOWED = 0x0008 | 0x0800  # sizes after the data; names in UTF-8


@dataclass(frozen=True)
class Member:
    """A stored member: its bytes are `start:start + size` of the archive."""

    name: str
    start: int
    size: int
    crc32: int


class StoredZip:
    """An open zip archive of stored members.

    Attributes:
      file: The mapped file underneath.
      members: Name to `Member`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        resolved: str | os.PathLike[str] | None = None,
    ):
        """Open `path` and check its directory; see `MappedFile` for `resolved`."""
        self.file = MappedFile(path, resolved)
        self._where = shown(self.file.path)
        self._checked: set[str] = set()
        try:
            self.members = self._directory()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; views handed out stay valid until dropped."""
        self.file.close()

    def read(self, name: str, limit: int) -> bytes:
        """Return the bytes of a small member after checking its CRC.

        Raises:
          FormatError: No such member, or larger than `limit`.
          IntegrityError: The CRC-32 does not match.
        """
        member = self.member(name)
        if member.size > limit:
            raise FormatError(
                f"{self._where}: member {name!r} has {member.size:,} bytes, at most "
                f"{limit:,} allowed"
            )
        self.check(name)
        return self.file.read(member.start, member.start + member.size)

    def member(self, name: str) -> Member:
        """Return a member, or raise `FormatError` when it is not there."""
        try:
            return self.members[name]
        except KeyError:
            raise FormatError(f"{self._where}: no member {name!r}") from None

    def check(self, name: str) -> None:
        """Compare a member's bytes with its recorded CRC-32, once.

        Raises:
          IntegrityError: They differ.
        """
        if name in self._checked:
            return
        member = self.member(name)
        crc = self.file.crc32(member.start, member.start + member.size)
        if crc != member.crc32:
            raise IntegrityError(
                f"{self._where}: member {name!r} is damaged: CRC-32 {crc:08x}, "
                f"recorded {member.crc32:08x}"
            )
        self._checked.add(name)

    def _fail(self, text: str) -> FormatError:
        return FormatError(f"{self._where}: {text}")

    def _end_record(self) -> tuple[int, int, int, int]:
        """Return (members, directory size, directory start, start of end records)."""
        size = self.file.size
        at = size - _END.size
        if at < 0:
            raise self._fail(f"{size} bytes is too short for a zip archive")
        magic, disk, disk2, here, count, length, start, comment = _END.unpack(
            self.file.read(at, size)
        )
        if magic != b"PK\x05\x06" or comment:
            raise self._fail("the zip end record is missing; truncated or not a zip")
        if at >= _LOCATOR64.size:
            locator = self.file.read(at - _LOCATOR64.size, at)
            magic, _, end64, _ = _LOCATOR64.unpack(locator)
            if magic == b"PK\x06\x07":
                if end64 + _END64.size != at - _LOCATOR64.size:
                    raise self._fail("the zip64 end record is out of place")
                fields = _END64.unpack(self.file.read(end64, end64 + _END64.size))
                magic, _, _, _, disk, disk2, here, count, length, start = fields
                if magic != b"PK\x06\x06":
                    raise self._fail("the zip64 end record is damaged")
                at = end64
        if disk or disk2 or here != count:
            raise self._fail("zip archives in several parts are not supported")
        if start + length != at:
            raise self._fail("the zip directory does not end where the archive does")
        if count > MAX_MEMBERS or length > MAX_DIRECTORY:
            raise self._fail(f"a zip directory of {count:,} members is too large")
        return count, length, start, at

    def _directory(self) -> dict[str, Member]:
        count, length, start, _ = self._end_record()
        data = self.file.read(start, start + length)
        members: dict[str, Member] = {}
        spans: list[tuple[int, int, str]] = []
        at = 0
        for _ in range(count):
            at, offset, member = self._entry(data, at)
            if member.name in members:
                raise self._fail(f"member {member.name!r} is given twice")
            members[member.name] = member
            spans.append((offset, member.start + member.size, member.name))
        if at != len(data):
            raise self._fail("the zip directory has bytes after its last member")
        spans.sort()
        before = 0
        for offset, end, name in [*spans, (start, start, "the directory")]:
            if offset < before:
                raise self._fail(f"{name!r} overlaps the member before it")
            before = end
        if spans and spans[0][0] != 0:
            raise self._fail("there are bytes before the first zip member")
        return members

    def _entry(self, data: bytes, at: int) -> tuple[int, int, Member]:
        """Return (next position, local header offset, member) of one record."""
        if at + _CENTRAL.size > len(data):
            raise self._fail("the zip directory is truncated")
        fields = _CENTRAL.unpack_from(data, at)
        magic, _, _, flags, method, _, _, crc, packed, size = fields[:10]
        n_name, n_extra, n_comment, disk, _, _, offset = fields[10:]
        raw = data[at + _CENTRAL.size :][: n_name + n_extra + n_comment]
        if magic != b"PK\x01\x02" or len(raw) != n_name + n_extra + n_comment:
            raise self._fail("the zip directory is damaged")
        name = self._name(raw[:n_name])
        extra = raw[n_name : n_name + n_extra]
        size, packed, offset = self._zip64(extra, size, packed, offset, name)
        if disk not in (0, 0xFFFF):
            raise self._fail("zip archives in several parts are not supported")
        if flags & ~_FLAGS_ALLOWED:
            kind = "is encrypted" if flags & 0x2041 else f"has flags {flags:#06x}"
            raise self._fail(f"member {name!r} {kind}, which is not allowed")
        if method != 0 or packed != size:
            raise self._fail(
                f"member {name!r} is compressed (method {method}); members must be "
                "stored as they are"
            )
        start = self._local(offset, name, raw[:n_name], flags, crc, size)
        after = at + _CENTRAL.size + len(raw)
        return after, offset, Member(name, start, size, crc)

    def _local(
        self, offset: int, name: str, raw: bytes, flags: int, crc: int, size: int
    ) -> int:
        """Compare the local header with the directory; return the data's start."""
        head = self.file.read(offset, offset + _LOCAL.size)
        fields = _LOCAL.unpack(head)
        magic, _, flags2, method, _, _, crc2, packed2, size2, n_name, n_extra = fields
        at = offset + _LOCAL.size
        later = flags & 0x0008  # crc and sizes follow the data and may be 0 here
        same = (
            magic == b"PK\x03\x04"
            and flags2 == flags
            and method == 0
            and self.file.read(at, at + n_name) == raw
            and (crc2 == crc or (later and crc2 == 0))
            and all(
                n in (size, 0xFFFFFFFF) or (later and n == 0) for n in (packed2, size2)
            )
        )
        if not same:
            raise self._fail(
                f"member {name!r}: its local header differs from the zip directory"
            )
        start = at + n_name + n_extra
        if start + size > self.file.size:
            raise self._fail(f"member {name!r} passes the end of the file")
        return start

    def _name(self, raw: bytes) -> str:
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self._fail(f"member name {raw[:80]!r} is not UTF-8") from None
        parts = name.split("/")
        if (
            not name.isprintable()
            or len(name) > 512
            or "\\" in name
            or ":" in name
            or any(part in ("", "..", ".") for part in parts)
        ):
            raise self._fail(f"member name {name[:80]!a} is not a plain relative path")
        return name

    def _zip64(
        self, extra: bytes, size: int, packed: int, offset: int, name: str
    ) -> tuple[int, int, int]:
        """Replace fields of all ones by their 64-bit values from the extra field."""
        values: list[int] = []
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<HH", extra, at)
            if kind == 1:
                body = extra[at + 4 : at + 4 + length]
                values = [
                    int.from_bytes(body[i : i + 8], "little")
                    for i in range(0, len(body) - 7, 8)
                ]
            at += 4 + length
        fields = []
        for field in (size, packed, offset):
            if field == 0xFFFFFFFF:
                if not values:
                    raise self._fail(f"member {name!r} lacks its 64-bit sizes")
                field = values.pop(0)
            fields.append(field)
        return fields[0], fields[1], fields[2]
