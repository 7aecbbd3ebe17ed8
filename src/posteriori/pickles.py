r"""Pickled checkpoints of PyTorch read as data: no code of theirs, or of anybody, is called.

A pickle is a program for a stack machine whose instructions include "import this" and "call that". Here is such a
machine without the two: what a file would import is a :class:`Name`, what it would make by a call is a
:class:`Record` of the name and its arguments. Only tensors are made, by the code below, from names that PyTorch gives
their parts. ``torch.load(weights_only=True)`` refuses files with other objects in them (whole modules, EDM's), and its
older versions could be made to run code (CVE-2025-32434).

Three containers: a zip file (torch.save since 1.6), a row of pickles and raw storages (before), and a plain pickle,
which holds the second kind in bytes.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

__all__ = ["Name", "PickleError", "Record", "read_pickle"]

_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
_SILENT = {"PROTO", "FRAME", "STOP"}
_PUSH = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class PickleError(ValueError):
    """A file that cannot be read as a checkpoint of PyTorch: why."""


@dataclass(frozen=True)
class Name:
    """Something that the file would import; nothing is."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An object of a class that is not made: what it would have been made of.

    Attributes:
        name: what would have been called.
        arguments: with which arguments.
        state: what its attributes would have been set from.
        items, entries: what it would have held as a mapping, and as a list or set.
    """

    name: Any
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    entries: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class _Storage:
    """A flat run of numbers, filled in when its bytes come."""

    dtype: torch.dtype
    count: int
    data: Tensor | None = None

    def fill(self, raw: bytes) -> None:
        if len(raw) != self.count * self.dtype.itemsize:
            raise PickleError(f"a storage of {self.count} {self.dtype} has {len(raw)} bytes: the file is damaged")
        self.data = torch.frombuffer(bytearray(raw), dtype=self.dtype) if raw else torch.empty(0, dtype=self.dtype)


@dataclass(eq=False)
class _View:
    """A tensor whose storage may not be there yet."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype | None = None

    def tensor(self) -> Tensor:
        data = self.storage.data
        if data is None:
            raise PickleError("a tensor's numbers are missing: the file is cut off")
        data = data if self.dtype is None else data.view(self.dtype)
        numbers: list[Any] = [self.offset, *self.size, *self.stride]  # whatever the file says
        if len(self.size) != len(self.stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise PickleError("a tensor has an impossible shape: the file is damaged")
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        if math.prod(self.size) and last >= len(data):  # it would read other memory
            raise PickleError("a tensor reaches beyond its storage: the file is damaged")
        return data.as_strided(self.size, self.stride, self.offset).clone()


class _Machine:
    """The stack machine; ``storage`` answers persistent ids."""

    def __init__(self, storage: Callable[[Any], Any]) -> None:
        self.storage = storage
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> Any:
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name in _PUSH:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name not in _SILENT:
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise PickleError(f"it uses the instruction {name}, which checkpoints do not need")
                step(argument)
        return self.stack.pop()

    def _pop_mark(self, _: Any = None) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._pop_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    # containers

    def _empty_list(self, _: Any) -> None:
        self.stack.append([])

    def _empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def _empty_set(self, _: Any) -> None:
        self.stack.append(Record(Name("builtins", "set")))

    def _tuple(self, _: Any) -> None:
        items = self._pop_mark()
        self.stack.append(tuple(items))

    def _list(self, _: Any) -> None:
        items = self._pop_mark()
        self.stack.append(items)

    def _dict(self, _: Any) -> None:
        items = self._pop_mark()
        self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def _frozenset(self, _: Any) -> None:
        items = self._pop_mark()
        self.stack.append(Record(Name("builtins", "frozenset"), entries=items))

    def _tuple1(self, _: Any) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def _tuple2(self, _: Any) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def _tuple3(self, _: Any) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        (target.entries if isinstance(target, Record) else target).extend(items)

    def _append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._pop_mark())

    _additems = _appends

    def _update(self, keys: list[Any], values: list[Any]) -> None:
        target = self.stack[-1]
        (target.items if isinstance(target, Record) else target).update(zip(keys, values, strict=True))

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key], [value])

    def _setitems(self, _: Any) -> None:
        items = self._pop_mark()
        self._update(items[::2], items[1::2])

    # memory

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _binget = _long_binget = _get

    # what would import and call

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(Name(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Name(str(module), str(name)))

    def _reduce(self, _: Any) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        self.stack.append(_made(called, tuple(arguments)))

    def _newobj(self, _: Any) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        self.stack.append(Record(kind, tuple(arguments)))

    def _newobj_ex(self, _: Any) -> None:
        named, arguments, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(Record(kind, tuple(arguments), items=dict(named)))

    def _inst(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        items = self._pop_mark()
        self.stack.append(Record(Name(module, name), tuple(items)))

    def _obj(self, _: Any) -> None:
        kind, *arguments = self._pop_mark()
        self.stack.append(Record(kind, tuple(arguments)))

    def _build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.state = state

    def _binpersid(self, _: Any) -> None:
        self.stack.append(self.storage(self.stack.pop()))


def _made(called: Any, arguments: tuple[Any, ...]) -> Any:
    """The parts that tensors consist of; a record of anything else."""
    match str(called) if isinstance(called, Name) else "":
        case "collections.OrderedDict" if not arguments:
            return {}
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2":
            storage, offset, size, stride = arguments[:4]
            return _View(storage, offset, tuple(size), tuple(stride))
        case "torch._utils._rebuild_tensor_v3":
            storage, offset, size, stride, _, _, dtype = arguments[:7]
            kind = getattr(torch, dtype.name, None)
            if not isinstance(kind, torch.dtype):
                raise PickleError(f"tensors of type {dtype} are not known here")
            return _View(storage, offset, tuple(size), tuple(stride), kind)
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
            return arguments[0]
        case "torch.Size":
            return tuple(arguments[0])
        case "_codecs.encode":  # bytes, before pickles had them
            return arguments[0].encode("latin1")
        case "torch.storage._load_from_bytes":
            return _read(io.BytesIO(arguments[0]))
    return Record(called, arguments)


class _Storages:
    """The storages that one file speaks of."""

    def __init__(self) -> None:
        self.known: dict[str, _Storage] = {}

    def __call__(self, identity: Any) -> Any:
        if identity[0] == "module":  # before 1.6, a class with its source text
            return identity[1]
        kind, storage_type, key, _, count = identity[:5]
        if kind != "storage" or not isinstance(count, int) or count < 0:
            raise PickleError("it refers to something other than a storage")
        dtype = _STORAGES.get(storage_type.name)
        if dtype is None:
            raise PickleError(f"storages of type {storage_type} are not known here")
        return self.known.setdefault(str(key), _Storage(dtype, count))


def _read(stream: BinaryIO) -> Any:
    """The object in a file of any of the three containers, its tensors still views."""
    if zipfile.is_zipfile(stream):
        return _read_zip(stream)
    stream.seek(0)
    storages = _Storages()
    first = _Machine(storages).run(stream)
    if first != _MAGIC:
        return first
    _, system = (_Machine(storages).run(stream) for _ in range(2))
    if not system.get("little_endian", True):
        raise PickleError("it was written on a big-endian machine")
    result = _Machine(storages).run(stream)
    for key in _Machine(storages).run(stream):
        (count,) = struct.unpack("<q", stream.read(8))
        storage = storages.known[str(key)]
        if count != storage.count:
            raise PickleError(f"a storage of {storage.count} numbers has {count}: the file is damaged")
        storage.fill(stream.read(count * storage.dtype.itemsize))
    return result


def _read_zip(stream: BinaryIO) -> Any:
    with zipfile.ZipFile(stream) as archive:
        names = archive.namelist()
        root = next((n.removesuffix("data.pkl") for n in names if n.endswith("data.pkl")), None)
        if root is None:
            raise PickleError("it is a zip file, but not one of torch.save")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise PickleError("it was written on a big-endian machine")
        storages = _Storages()
        result = _Machine(storages).run(io.BytesIO(archive.read(f"{root}data.pkl")))
        for key, storage in storages.known.items():
            storage.fill(archive.read(f"{root}data/{key}"))
    return result


def _settle(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """The object with its views as tensors. Containers are changed in place, so that loops in it stay loops; ``done``
    keeps what was settled alive, so that its identity is not given to another object."""
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, _View):
        done[id(value)] = value, value.tensor()
        return done[id(value)][1]
    if isinstance(value, tuple):
        return tuple(_settle(v, done) for v in value)
    if isinstance(value, dict | list | Record):
        done[id(value)] = value, value
    if isinstance(value, dict):
        value.update({k: _settle(v, done) for k, v in value.items()})
    elif isinstance(value, list):
        value[:] = [_settle(v, done) for v in value]
    elif isinstance(value, Record):
        value.arguments, value.state = _settle(value.arguments, done), _settle(value.state, done)
        _settle(value.items, done)
        _settle(value.entries, done)
    return value


def read_pickle(path: str | Path) -> Any:
    """What a pickled checkpoint holds: tensors, plain values and containers, and records of everything else.

    Raises:
        PickleError: when it is no such file, or damaged.
    """
    try:
        with Path(path).open("rb") as stream:
            return _settle(_read(stream), {})
    except PickleError as error:
        raise PickleError(f"{path}: {error}") from None
    except OSError as error:
        raise PickleError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error, EOFError, RecursionError,
            RuntimeError, zipfile.BadZipFile, UnicodeError, MemoryError) as error:  # fmt: skip
        raise PickleError(f"{path} is no checkpoint of PyTorch, or damaged ({error})") from None
