"""An interpreter for the pickles inside PyTorch checkpoints that executes nothing.

A pickle is a program. This one understands only what a plain state dict needs: plain
data, `collections.OrderedDict`, tensor rebuilds and storages. Names in the pickle are
looked up in a table of strings; nothing is imported, called or constructed on its
behalf, so an unknown name is an error before it can have an effect. The result is a
description of tensors (`TensorRef`); their bytes lie elsewhere.

Bounded: 8 MB of pickle, a million operations, integers of 8 bytes, and keys that are
text or integers, so neither a memo, a hash nor a length can blow up.

Reference: CPython `pickletools`; `torch/_utils.py` for the rebuild functions.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qjax.errors import FormatError

MAX_BYTES = 8 << 20
MAX_OPERATIONS = 1_000_000

STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": None,
}
DTYPES = {
    "float64": "float64",
    "double": "float64",
    "float32": "float32",
    "float": "float32",
    "float16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "int64": "int64",
    "int32": "int32",
    "int16": "int16",
    "int8": "int8",
    "uint8": "uint8",
    "uint16": "uint16",
    "uint32": "uint32",
    "uint64": "uint64",
    "bool": "bool",
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
    "float8_e8m0fnu": "float8_e8m0fnu",
}


@dataclass(frozen=True)
class StorageRef:
    """A run of bytes in the archive; `count` is in elements, or bytes if untyped."""

    dtype: str | None
    key: str
    count: int


@dataclass(frozen=True)
class TensorRef:
    """A strided window on a storage; `offset` and `strides` count elements."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """A name of the table: inert, only compared."""

    name: str


class _Mark:
    """The stack marker."""


_MARK = _Mark()


def _table() -> dict[tuple[str, str], _Name | str]:
    """Return every (module, name) a state dict may mention; dtypes are strings."""
    table: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): _Name("OrderedDict"),
        ("torch", "Size"): _Name("Size"),
        ("torch._utils", "_rebuild_tensor_v2"): _Name("tensor"),
        ("torch._utils", "_rebuild_tensor_v3"): _Name("tensor"),
        ("torch._utils", "_rebuild_parameter"): _Name("parameter"),
    }
    for name in STORAGE_DTYPES:
        for module in ("torch", "torch.storage"):
            table[module, name] = _Name(name)
    for name, dtype in DTYPES.items():
        table["torch", name] = dtype
    return table


_TABLE = _table()


def parse_state(data: bytes, where: str) -> Any:
    """Return the value a pickle describes, with `TensorRef` for tensors.

    Args:
      data: The pickle.
      where: File and member for messages.

    Returns:
      Nested dict, list, tuple, text, number, None and `TensorRef`.

    Raises:
      FormatError: The pickle holds anything but a plain state dict; the message names
        the global or operation. Nothing was executed.
    """
    if len(data) > MAX_BYTES:
        raise FormatError(
            f"{where}: a pickle of {len(data):,} bytes, at most {MAX_BYTES:,} allowed"
        )
    return _Interpreter(data, where).run()


class _Interpreter:
    """One pass over the operations; the stack holds inert values only."""

    def __init__(self, data: bytes, where: str):
        self._data, self._where, self._at = data, where, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MAX_OPERATIONS):
            code = self._take(1)
            if code == b".":
                if len(self._stack) != 1:
                    raise self.fail("the pickle ends with an unbalanced stack")
                return self._stack[0]
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise self.fail(
                    f"pickle operation {code!r} is not part of a state dict; nothing "
                    "was executed"
                )
            operation(self)
        raise self.fail(f"the pickle has more than {MAX_OPERATIONS:,} operations")

    def fail(self, text: str) -> FormatError:
        return FormatError(f"{self._where}: byte {self._at}: {text}")

    def _take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise self.fail("the pickle is truncated")
        self._at += count
        return part

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + 512)
        if end < 0:
            raise self.fail("a name in the pickle does not end")
        line = self._take(end + 1 - self._at)[:-1]
        return self._decode(line)

    def _decode(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("text in the pickle is not UTF-8") from None

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise self.fail("the pickle takes from an empty stack")
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        for at in range(len(self._stack) - 1, -1, -1):
            if self._stack[at] is _MARK:
                items = self._stack[at + 1 :]
                del self._stack[at:]
                return items
        raise self.fail("the pickle lacks a mark")

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise self.fail(
                f"the pickle changes something that is not a {kind.__name__}"
            )
        return self._stack[-1]

    # Operations, one method each or a lambda in the table below.

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def protocol(self) -> None:
        version = self._number("<B")
        if version > 5:
            raise self.fail(f"pickle protocol {version} is unknown")

    def text(self, layout: str) -> None:
        self.push(self._decode(self._take(self._number(layout))))

    def long(self) -> None:
        count = self._number("<B")
        if count > 9:
            raise self.fail(f"an integer of {count} bytes in the pickle")
        self.push(int.from_bytes(self._take(count), "little", signed=True))

    def global_(self) -> None:
        self._look_up(self._line(), self._line())

    def stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self.fail("a global of the pickle is not named by text")
        self._look_up(module, name)

    def _look_up(self, module: str, name: str) -> None:
        value = _TABLE.get((module, name))
        if value is None:
            raise self.fail(
                f"the pickle asks for {module[:100]}.{name[:100]}, which is not part "
                "of a plain state dict; nothing was executed. If you trust its "
                "origin, save the tensors as safetensors and open that"
            )
        self.push(value)

    def put(self, index: int) -> None:
        if not self._stack or self._stack[-1] is _MARK:
            raise self.fail("the pickle stores from an empty stack")
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise self.fail(f"the pickle refers to entry {index} it never stored")
        self.push(self._memo[index])

    def tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def appends(self) -> None:
        items = self._pop_mark()
        self._top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise self.fail("a dict of the pickle has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise self.fail(f"a dict key is a {type(key).__name__}, expected text")
            if key in target:
                raise self.fail(f"key {str(key)[:100]!a} is given twice")
            target[key] = value

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self.set_items([key, value])

    def persistent(self) -> None:
        entry = self._pop()
        if isinstance(entry, tuple) and len(entry) == 5 and entry[0] == "storage":
            _, kind, key, _, count = entry
            if (
                isinstance(kind, _Name)
                and kind.name in STORAGE_DTYPES
                and isinstance(key, str)
                and _natural(count)
            ):
                self.push(StorageRef(STORAGE_DTYPES[kind.name], key, count))
                return
        raise self.fail("an external reference is not a plain tensor storage")

    def reduce(self) -> None:
        args, function = self._pop(), self._pop()
        if not isinstance(function, _Name) or not isinstance(args, tuple):
            raise self.fail("the pickle calls something that is not a function")
        self.push(self._apply(function.name, args))

    def build(self) -> None:
        """Attributes of an OrderedDict (`_metadata`) are dropped."""
        if not isinstance(self._pop(), dict):
            raise self.fail("the pickle sets a state that is not a dict")
        self._top(dict)

    def _apply(self, function: str, args: tuple[Any, ...]) -> Any:
        if function == "OrderedDict" and args == ():
            return {}
        if function == "Size" and len(args) == 1 and _naturals(args[0]):
            return tuple(args[0])
        if function == "parameter" and args and isinstance(args[0], TensorRef):
            return args[0]
        if function == "tensor" and len(args) >= 6 and isinstance(args[0], StorageRef):
            return self._tensor(*args)
        raise self.fail(f"{function} is called with unexpected arguments")

    def _tensor(
        self,
        storage: StorageRef,
        offset: Any,
        shape: Any,
        strides: Any,
        grad: Any,
        hooks: Any,
        *rest: Any,
    ) -> TensorRef:
        dtype = storage.dtype
        if rest and isinstance(rest[0], str):
            dtype, rest = rest[0], rest[1:]
        if any(rest):
            raise self.fail("tensors with conjugate or other extra state")
        if dtype is None or dtype not in DTYPES:
            raise self.fail("a tensor over an untyped storage lacks its dtype")
        if storage.dtype not in (None, dtype):
            raise self.fail(f"a {dtype} tensor over a storage of {storage.dtype}")
        if not _naturals(shape) or not _naturals(strides) or not _natural(offset):
            raise self.fail("shape, strides and offset must be non-negative integers")
        if len(shape) != len(strides) or len(shape) > 8:
            raise self.fail("shape and strides must be of one rank, at most 8")
        return TensorRef(storage, dtype, offset, tuple(shape), tuple(strides))


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _naturals(values: Any) -> bool:
    return isinstance(values, tuple) and all(_natural(v) for v in values)


_OPERATIONS: dict[bytes, Callable[[_Interpreter], Any]] = {
    b"\x80": _Interpreter.protocol,
    b"\x95": lambda m: m._number("<Q"),
    b"(": lambda m: m.push(_MARK),
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m._number("<i")),
    b"K": lambda m: m.push(m._number("<B")),
    b"M": lambda m: m.push(m._number("<H")),
    b"G": lambda m: m.push(m._number(">d")),
    b"\x8a": _Interpreter.long,
    b"X": lambda m: m.text("<I"),
    b"\x8c": lambda m: m.text("<B"),
    b"c": _Interpreter.global_,
    b"\x93": _Interpreter.stack_global,
    b"q": lambda m: m.put(m._number("<B")),
    b"r": lambda m: m.put(m._number("<I")),
    b"\x94": lambda m: m.put(len(m._memo)),
    b"h": lambda m: m.get(m._number("<B")),
    b"j": lambda m: m.get(m._number("<I")),
    b"t": lambda m: m.push(tuple(m._pop_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"a": _Interpreter.append,
    b"e": _Interpreter.appends,
    b"s": _Interpreter.set_item,
    b"u": lambda m: m.set_items(m._pop_mark()),
    b"Q": _Interpreter.persistent,
    b"R": _Interpreter.reduce,
    b"b": _Interpreter.build,
}
