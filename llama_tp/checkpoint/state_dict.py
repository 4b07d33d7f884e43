"""The pickle in a .pth, read as data: which tensor views which bytes of which record. Nothing is
called and no tensor is made.

torch's restricted unpickler runs no foreign code, but a file can keep it busy for ever: it hashes
whatever stands in the place of a key (pairs of the same pair, 32 deep, take 2^32 steps), and builds
bytearrays, sets and sparse tensors of any size. This one knows the operations that torch.save
writes for a dict of plain tensors, hashes texts and numbers only, and counts its steps.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llama_tp.arch.errors import short

# What torch calls a storage of a dtype; dtypes younger than these come with an untyped storage and
# are named beside it.
_STORAGES = {
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.HalfStorage": torch.float16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.ShortStorage": torch.int16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": torch.uint8,
}
_CLASSES = (
    "collections.OrderedDict",
    "torch.Tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
)
_MOST_DIMS = 8
_MOST = 1 << 63  # torch's sizes are signed 64-bit integers


class BadPickle(ValueError):
    """The pickle is damaged, or holds something else than a dict of plain tensors; the text says
    what."""


@dataclass(frozen=True)
class Storage:
    """A record of the file, by its key, with the dtype of its elements."""

    key: str
    dtype: torch.dtype
    n_bytes: int


@dataclass(frozen=True)
class View:
    """A tensor: its place in a storage. Offset and strides count elements of `dtype`."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Name:
    """Something of Python's or torch's that the pickle refers to; it stays a name."""

    path: str


def read_pickle(raw: bytes, most_steps: int) -> Any:
    """What a pickle of torch.save holds, with a View for each tensor. Raises BadPickle after
    `most_steps` operations, and for whatever a dict of plain tensors does not need."""
    machine = _Machine()
    try:
        for step, (operation, argument, _) in enumerate(pickletools.genops(raw)):
            if step >= most_steps:
                raise BadPickle(f"it takes more than {most_steps:,} steps to read")
            if operation.name == "STOP":
                return machine.pop()
            machine.do(operation.name, argument)
    except BadPickle:
        raise
    # cut short; nothing on the stack; nothing remembered
    except (ValueError, IndexError, KeyError) as error:
        raise BadPickle(f"its pickle is damaged: {type(error).__name__}: {error}"[:200]) from None
    raise BadPickle("its pickle does not end")


class _Machine:
    """Pickle's stack machine, as far as torch.save uses it (protocol 2)."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}
        self._storages: dict[str, Storage] = {}

    def pop(self) -> Any:
        return self._stack.pop()

    def do(self, name: str, argument: Any) -> None:
        if name in ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "BINFLOAT", "NONE"):
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        elif name in _METHODS:
            _METHODS[name](self, argument)
        elif name != "PROTO":
            raise BadPickle(f"it uses the operation {name}")

    def _mark(self, _: object) -> None:
        self._marks.append(len(self._stack))

    def _after_mark(self) -> list[Any]:
        start = self._marks.pop()
        found = self._stack[start:]
        del self._stack[start:]
        return found

    def _last(self, n: int) -> list[Any]:
        if n > len(self._stack):
            raise BadPickle("its pickle is damaged: the stack is empty")
        found = self._stack[-n:]
        del self._stack[-n:]
        return found

    def _get(self, place: int) -> None:
        self._stack.append(self._memo[place])

    def _put(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def _tuple(self, _: object) -> None:
        self._stack.append(tuple(self._after_mark()))

    def _append(self, items: list[Any]) -> None:
        self._top(list, "a list").extend(items)

    def _set(self, items: list[Any]) -> None:
        found = self._top(dict, "a dict")
        if len(items) % 2:
            raise BadPickle("its pickle is damaged: a key without a value")
        for key, value in zip(items[::2], items[1::2]):
            if type(key) not in (str, int):  # before it is hashed
                raise BadPickle(f"a key must be a text, found a {type(key).__name__}")
            if key in found:
                raise BadPickle(f"the key {short(key)} stands there twice")
            found[key] = value

    def _top(self, kind: type, what: str) -> Any:
        if type(self._stack[-1]) is not kind:
            raise BadPickle(
                f"its pickle is damaged: a {type(self._stack[-1]).__name__} stands in the place of "
                f"{what}"
            )
        return self._stack[-1]

    def _global(self, argument: str) -> None:
        path = argument.replace(" ", ".", 1)
        module, _, name = path.rpartition(".")
        dtype = getattr(torch, name, None) if module == "torch" else None
        if not isinstance(dtype, torch.dtype) and path not in _STORAGES and path not in _CLASSES:
            raise BadPickle(f"it asks for {path[:150]!a}")
        self._stack.append(dtype if isinstance(dtype, torch.dtype) else Name(path))

    def _storage(self, _: object) -> None:
        """A persistent id stands for a record: ("storage", its type, its key, where it once was,
        its number of elements)."""
        match self.pop():
            case ("storage", Name(path), str(key), _, int(n)) if (
                path in _STORAGES and 0 <= n < _MOST
            ):
                storage = Storage(key, _STORAGES[path], n * _STORAGES[path].itemsize)
            case other:
                raise BadPickle(f"it refers to a record as {short(other)}")
        if self._storages.setdefault(key, storage) != storage:
            raise BadPickle(f"it describes the record {short(key)} in two ways")
        self._stack.append(storage)

    def _reduce(self, _: object) -> None:
        name, arguments = self._last(2)
        match name:
            case Name(path) if type(arguments) is tuple:
                self._stack.append(_rebuilt(path, arguments))
            case _:
                raise BadPickle("its pickle is damaged: it calls what is no function")

    def _build(self, _: object) -> None:
        """The attributes of a state dict (its modules' versions) mean nothing here."""
        self.pop()
        self._top(dict, "a dict")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_METHODS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine._mark,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "TUPLE": _Machine._tuple,
    "TUPLE1": lambda machine, _: machine._stack.append(tuple(machine._last(1))),
    "TUPLE2": lambda machine, _: machine._stack.append(tuple(machine._last(2))),
    "TUPLE3": lambda machine, _: machine._stack.append(tuple(machine._last(3))),
    "APPEND": lambda machine, _: machine._append(machine._last(1)),
    "APPENDS": lambda machine, _: machine._append(machine._after_mark()),
    "SETITEM": lambda machine, _: machine._set(machine._last(2)),
    "SETITEMS": lambda machine, _: machine._set(machine._after_mark()),
    "GLOBAL": _Machine._global,
    "BINPERSID": _Machine._storage,
    "REDUCE": _Machine._reduce,
    "BUILD": _Machine._build,
}


def _rebuilt(path: str, arguments: tuple[Any, ...]) -> dict[Any, Any] | View:
    """What torch would make by a call of `path`: an empty OrderedDict, or a tensor as a View of its
    storage."""
    match path.rpartition(".")[2], arguments:
        case "OrderedDict", ():
            return {}
        case "_rebuild_tensor_v2", (
            Storage() as storage,
            offset,
            shape,
            stride,
            bool(),
            dict(),
            *metadata,
        ):
            return _view(storage, storage.dtype, offset, shape, stride, metadata)
        case "_rebuild_tensor_v3", (
            Storage() as storage,
            offset,
            shape,
            stride,
            bool(),
            dict(),
            torch.dtype() as dtype,
            *metadata,
        ):
            return _view(storage, dtype, offset, shape, stride, metadata)
        case "_rebuild_parameter", (View() as view, bool(), dict()):
            return view
        case "_rebuild_parameter_with_state", (View() as view, bool(), dict(), dict()):
            return view
        case "_rebuild_from_type_v2", (Name(function), Name("torch.Tensor"), tuple() as inner, _):
            if function.endswith("_rebuild_from_type_v2"):  # one inside the other, without end
                raise BadPickle("a tensor is wrapped twice")
            return _rebuilt(function, inner)
    raise BadPickle(f"it calls {path} with {short(arguments)}")


def _view(
    storage: Storage, dtype: torch.dtype, offset: Any, shape: Any, stride: Any, metadata: list[Any]
) -> View:
    """metadata marks tensors whose elements are to be negated or conjugated when they are read."""
    sizes = (offset, *shape, *stride) if type(shape) is type(stride) is tuple else (None,)
    good = all(type(size) is int and 0 <= size < _MOST for size in sizes)
    if not good or len(shape) != len(stride) or len(shape) > _MOST_DIMS:
        raise BadPickle(
            f"a tensor has the shape {short(shape)}, the strides {short(stride)} and the offset "
            f"{short(offset)}"
        )
    if any(metadata) or len(metadata) > 1:
        raise BadPickle("a tensor is stored negated or conjugated")
    return View(storage, dtype, offset, shape, stride)
