"""What decoder layers are given beside the hidden states, kept so that a layer can run again for any window.

Most of it is equal for all windows (masks, rotary embeddings) and kept once, on the device. Tensors that
differ (Gemma 4's per-layer inputs) are kept per window, on the host. Mappings into which some layers write
for later ones (Gemma 4's shared keys and values) belong to a window and to a stream of hidden states, for
what is written depends on both: :class:`SharedValues`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_spense.models.parts import UnsupportedModelError

Allocate = Callable[[Sequence[int], torch.dtype], torch.Tensor]
Key = tuple[int, Any]
"""Number of a mapping, and the key of a value in it."""


class SharedValues:
    """What layers of one stream wrote into shared mappings: ``[window, key]``, by the layer that wrote it.

    A layer reads what stood there before it, however often it runs and in whichever order.
    """

    def __init__(self) -> None:
        self._written: dict[int, dict[Key, dict[int, Any]]] = {}

    def read(self, window: int, layer: int) -> dict[Key, tuple[int, Any]]:
        """What the layers before ``layer`` left there, each with its writer."""
        found = {}
        for key, versions in self._written.get(window, {}).items():
            writer = max((number for number in versions if number < layer), default=None)
            if writer is not None:
                found[key] = writer, versions[writer]
        return found

    def write(self, window: int, layer: int, key: Key, value: Any) -> None:
        """Replaces what an earlier run of the same layer wrote."""
        self._written.setdefault(window, {}).setdefault(key, {})[layer] = value

    def copy(self) -> SharedValues:
        """For a second stream. The values are never changed in place."""
        twin = SharedValues()
        twin._written = {
            window: {key: dict(versions) for key, versions in found.items()}
            for window, found in self._written.items()
        }
        return twin


@dataclass
class Call:
    """The arguments of one run of a layer, on the device.

    ``read``: by key the writer and the value (tensors, tuples of them) that stand in shared mappings.
    """

    window: int
    device: torch.device
    shared: dict[Key, tuple[int, Any]]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    read: dict[Key, tuple[int, Any]] = field(default_factory=dict)
    _mappings: dict[int, tuple[MutableMapping, dict]] = field(default_factory=dict)

    def written(self) -> dict[Key, Any]:
        """What the layer put into shared mappings, as it is: on the device, with its graph."""
        return {
            (number, key): value
            for number, (mapping, given) in self._mappings.items()
            for key, value in mapping.items()
            if key not in given or given[key] is not value
        }

    def mapping(self, number: int, kind: MutableMapping, given: dict) -> MutableMapping:
        """This run's own copy of a mapping, one for all arguments that are the same mapping."""
        if number not in self._mappings:
            for (owner, key), (writer, value) in self.shared.items():
                if owner == number:
                    given[key] = map_tensors(lambda x: x.detach().to(self.device), value)
                    self.read[owner, key] = writer, given[key]
            mapping = copy.copy(kind)
            mapping.clear()
            mapping.update(given)
            self._mappings[number] = mapping, given
        return self._mappings[number][0]


class Arguments:
    """The arguments of every layer but the hidden states, for ``windows`` of equal length.

    ``allocate`` makes the host tensors for what differs. Raises :class:`UnsupportedModelError` naming a
    layer's argument that differs in another way than by a tensor's values.
    """

    def __init__(self, names: Sequence[str], windows: int, allocate: Allocate) -> None:
        self._names = names
        self._windows = windows
        self._allocate = allocate
        self._layers: list[dict[Any, _Argument]] = [{} for _ in names]
        self._made: dict[int, tuple[Any, _Argument]] = {}  # by identity in the first window
        self._mappings = 0

    def finish(self) -> None:
        """All windows are recorded: let go of what only served to compare them."""
        self._made = {}
        for kept in self._layers:
            for argument in kept.values():
                argument.finish()

    def record(self, window: int, layer: int, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of ``layer`` in ``window``; the windows come in order."""
        given = dict(enumerate(args)) | kwargs
        kept = self._layers[layer]
        if window == 0:
            kept |= {name: self._make(value) for name, value in given.items()}
            return
        if given.keys() != kept.keys():
            raise UnsupportedModelError(
                f"{self._names[layer]} gets other arguments in some windows: "
                f"{sorted(map(str, given.keys() ^ kept.keys()))}"
            )
        for name, value in given.items():
            try:
                kept[name].put(window, value)
            except _DiffersError as error:
                raise UnsupportedModelError(
                    f"{self._names[layer]}: its argument {name!r} differs between windows of one length "
                    f"({error}), so that the layer cannot be run by itself"
                ) from None

    def call(self, window: int, layer: int, shared: SharedValues, device: torch.device) -> Call:
        """The arguments of ``layer`` for ``window``, as the layers before it left them."""
        call = Call(window, device, shared.read(window, layer))
        values = {name: kept.get(call) for name, kept in self._layers[layer].items()}
        call.args = tuple(value for name, value in values.items() if isinstance(name, int))
        call.kwargs = {name: value for name, value in values.items() if isinstance(name, str)}
        return call

    def _make(self, value: Any) -> _Argument:
        if id(value) not in self._made:
            made: _Argument
            if isinstance(value, torch.Tensor):
                made = _Tensor(value, self._windows, self._allocate)
            elif isinstance(value, MutableMapping):
                made = _Mapping(self._mappings, value, {k: self._make(v) for k, v in value.items()})
                self._mappings += 1
            elif type(value) in (tuple, list):
                made = _Sequence(type(value), [self._make(item) for item in value])
            else:
                made = _Constant(value)
            self._made[id(value)] = value, made
        return self._made[id(value)][1]


class _DiffersError(Exception):
    """Says how a value differs from the first window's."""


class _Argument:
    """One value among the arguments, maybe of several layers."""

    def put(self, window: int, value: Any) -> None:
        """The value in a further window."""
        raise NotImplementedError

    def get(self, call: Call) -> Any:
        """The value in this call's window."""
        raise NotImplementedError

    def finish(self) -> None:
        """No further window comes."""


@dataclass
class _Constant(_Argument):
    value: Any

    def put(self, window: int, value: Any) -> None:
        if value is not self.value and not (type(value) is type(self.value) and value == self.value):
            raise _DiffersError(f"{type(self.value).__name__}, {type(value).__name__}")

    def get(self, call: Call) -> Any:
        return self.value


@dataclass
class _Tensor(_Argument):
    """``value`` of all windows, or that of the first until one differs; then ``rows`` [windows, …]."""

    value: torch.Tensor
    windows: int
    allocate: Allocate
    rows: torch.Tensor | None = None
    last: tuple[int, torch.Tensor] | None = None

    def put(self, window: int, value: Any) -> None:
        if self.last is not None and self.last[0] == window and self.last[1] is value:
            return  # of another layer: the same tensor
        if not isinstance(value, torch.Tensor):
            raise _DiffersError(f"Tensor, {type(value).__name__}")
        if value.shape != self.value.shape or value.dtype != self.value.dtype:
            before, now = ((list(x.shape), x.dtype) for x in (self.value, value))
            raise _DiffersError(f"{before}, {now}")
        if self.last is not None and self.last[0] == window:
            known = self.last[1] if self.rows is None else self.rows[window]
            if not torch.equal(known, value.to(known.device)):
                raise _DiffersError("it is one tensor for several layers in some windows only")
            return
        self.last = window, value
        if self.rows is None and torch.equal(value, self.value):
            return
        if self.rows is None:
            self.rows = self.allocate((self.windows, *value.shape), value.dtype)
            self.rows[:window] = self.value.to(self.rows.device)
            self.value = torch.empty_like(self.value, device="meta")
        self.rows[window] = value

    def finish(self) -> None:
        self.last = None

    def get(self, call: Call) -> torch.Tensor:
        return self.value if self.rows is None else self.rows[call.window].to(call.device)


@dataclass
class _Sequence(_Argument):
    kind: type
    items: list[_Argument]

    def put(self, window: int, value: Any) -> None:
        if not isinstance(value, tuple | list) or len(value) != len(self.items):
            raise _DiffersError(f"{self.kind.__name__} of {len(self.items)}, {type(value).__name__}")
        for item, new in zip(self.items, value, strict=True):
            item.put(window, new)

    def finish(self) -> None:
        for item in self.items:
            item.finish()

    def get(self, call: Call) -> Any:
        return self.kind(item.get(call) for item in self.items)


@dataclass
class _Mapping(_Argument):
    number: int
    kind: MutableMapping
    items: dict[Any, _Argument]

    def __post_init__(self) -> None:
        self.kind = copy.copy(self.kind)
        self.kind.clear()  # what stood in it may be large

    def put(self, window: int, value: Any) -> None:
        if not isinstance(value, MutableMapping) or value.keys() != self.items.keys():
            raise _DiffersError(f"a mapping with the keys {list(self.items)}, {type(value).__name__}")
        for key, new in value.items():
            self.items[key].put(window, new)

    def finish(self) -> None:
        for item in self.items.values():
            item.finish()

    def get(self, call: Call) -> MutableMapping:
        return call.mapping(self.number, self.kind, {k: item.get(call) for k, item in self.items.items()})


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """``value`` with ``change`` of each tensor in it, through tuples and lists."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(change, item) for item in value)
    return value


def floating_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors in ``value``, in the order of :func:`map_tensors`."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif type(value) in (tuple, list):
        for item in value:
            yield from floating_tensors(item)
