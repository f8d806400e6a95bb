"""Weights in memory while they are used: a block at a time where not all fit.

A checkpoint is opened in the types that it stores, so that its tensors are pages of its files that
the system reads when they are touched and drops when memory is short. What a model computes with,
float32 on a CPU, is made of them part by part: a part is a block, a token embedding or an output
head. Its forward converts its matrices when it begins; they stay for the next call, and go, the
longest unused first, when the parts in memory exceed a limit. Without a limit every part is there
from the beginning, and stays.

A matrix that is not there is represented by a tensor of its shape and type that holds NaN in a
single number of memory: what reads it by mistake cannot go unnoticed.

A matrix has a source: the stored tensor, another tensor that replaces it, or a function that makes
it, such as the multiplying out of compressed codes (`write`), of which an embedding asks for the
rows that it looks up (`MakesRows`). The stored tensor is never changed,
so that the dense model can be had again (`restore`) and needs no copy.

Departure from accelerate's `disk_offload`, which loads linear by linear from a hook: a block is
loaded once for all batches, parts outlive a call, and replaced weights are known. Numbers are the
same whatever the limit: the same values go into the same operations.

Limits: vectors (norms, biases) and matrices outside of the blocks and the vocabulary are converted
at once and stay. Pages of files are given back on Linux alone (elsewhere the system decides).
Checkpoints that mix floating types, and stacked experts, are read into memory whole.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from cptq.checkpoint.pages import MappedFiles, return_large_tensors, trim_heap

#: attribute of a module that holds {name of a parameter: its `Weight`}
_HELD = "_cptq_weights"


@runtime_checkable
class MakesRows(Protocol):
    """A function that makes a matrix, or some of its rows alone, of what may lie in files."""

    def __call__(self) -> Tensor:
        """Return the matrix."""

    def take_rows(self, ids: Tensor) -> Tensor:
        """Return the rows (..., in) of `ids` (...)."""

    def drop_pages(self, files: MappedFiles) -> None:
        """Give back the pages of mapped files that it has read."""


Source = Tensor | MakesRows | Callable[[], Tensor]


class Weight:
    """One matrix, shared by all modules that hold it (`owners`).

    `stored` is as the checkpoint has it, in the CPU's memory; `source` is where its values come
    from now, on any device. `current` is what the modules compute with, None while it is not in
    memory. What is read lies where the model computes.
    """

    def __init__(self, parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> None:
        #: kept, so that its identity stands for no other
        self.parameter = parameter
        self.stored = parameter.detach()
        self.source: Source = self.stored
        self.owners: list[tuple[nn.Module, str]] = []
        self.current: nn.Parameter | None = None
        self._device, self._dtype = device, dtype
        self._users = 0
        self._pinned = False
        nothing = torch.full((1,), torch.nan, dtype=dtype, device=device)
        self._absent = nn.Parameter(nothing.expand(parameter.shape), requires_grad=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Weight:
        """Return a copy whose owners are the copied modules; sources are shared."""
        other = Weight.__new__(Weight)
        memo[id(self)] = other
        other.__dict__.update(self.__dict__)
        other.owners = [(copy.deepcopy(module, memo), name) for module, name in self.owners]
        return other

    @property
    def nbytes(self) -> int:
        """Bytes in memory, in the type that the model computes in."""
        return self.stored.numel() * self._dtype.itemsize

    def read(self) -> Tensor:
        """Return the values on the model's device, in its type or the checkpoint's narrower one."""
        if self.current is not None:
            return self.current.detach()
        values = self.source if isinstance(self.source, Tensor) else self.source()
        return values.to(self._device)

    def read_stored(self) -> Tensor:
        """Return the values of the checkpoint on the model's device, in the checkpoint's type."""
        return self.stored.to(self._device)

    def write(self, source: Source) -> None:
        """Take the values from another source from now on."""
        if self._pinned:
            assert self.current is not None
            self.current.data.copy_(source if isinstance(source, Tensor) else source())
            return
        self.source = source
        if self.current is not None:
            self._place(self._convert())

    def load(self) -> None:
        """Bring the values into memory, for one more user."""
        self._users += 1
        if self.current is None:
            self._place(self._convert())

    def unload(self) -> None:
        """Let go of the values, for one user."""
        self._users -= 1
        if not self._users and not self._pinned:
            self.current = None
            self.place_absent()

    def pin(self) -> None:
        """Keep the values in memory for good, in a tensor of their own that may be changed."""
        if not self._pinned:
            values = self._convert()
            self._place(values.clone() if values is self.source else values)
            self._pinned = True

    def place_absent(self) -> None:
        """Represent the matrix in its modules while it is not in memory."""
        self._set(self._absent)

    def _convert(self) -> Tensor:
        values = self.source if isinstance(self.source, Tensor) else self.source()
        return values.to(self._device, self._dtype)

    def _place(self, values: Tensor) -> None:
        tracked = self.current is not None and self.current.requires_grad
        self.current = nn.Parameter(values, requires_grad=tracked)
        self._set(self.current)

    def _set(self, parameter: nn.Parameter) -> None:
        for module, name in self.owners:
            module._parameters[name] = parameter


class Part:
    """A module whose matrices come and go together. `users` are its calls that are under way."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = tuple(weights)
        self.users = 0

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)


class ResidentWeights:
    """Which parts of a model are in memory.

    Args:
        device: where the model computes.
        dtype: the type that it computes in.
        limit: bytes that the parts in memory may take; None: no limit. A part that is in use is
            there whatever the limit. Where not all fit, the limit becomes that of a block.
        files: of the checkpoint, whose pages are given back.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, limit: int | None, files: MappedFiles
    ) -> None:
        self._device, self.dtype = device, dtype
        self.limit = limit
        self._files = files
        self._weights: dict[int, Weight] = {}
        self._parts: list[Part] = []
        self._loaded: dict[Part, None] = {}

    def manage(self, module: nn.Module, parts: Iterable[nn.Module]) -> None:
        """Let the matrices of these parts of a model come and go, and convert all else.

        Called once; afterwards the parts are in memory if all fit, and none if not.
        """
        chosen = list(parts)
        for place in chosen:
            self._parts.append(Part(self._take(place)))
        self._find_owners(module)
        for parameter in module.parameters():
            if id(parameter) not in self._weights:
                parameter.data = self._convert(parameter.data)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self._device)
        for weight in self._weights.values():
            weight.place_absent()
        for place, part in zip(chosen, self._parts, strict=True):
            place.forward = _wrap_forward(self, part, place)
        if self.limit is None or sum(w.nbytes for w in self._weights.values()) <= self.limit:
            self.limit = None
            for part in self._parts:
                self._load(part)
        else:
            blocks = [part.nbytes for part in self._parts if len(part.weights) > 1]
            self.limit = min(self.limit, max(blocks, default=self.limit))
            return_large_tensors()

    def _convert(self, tensor: Tensor) -> Tensor:
        floating = tensor.is_floating_point()
        return tensor.to(self._device, self.dtype if floating else tensor.dtype)

    def _take(self, part: nn.Module) -> list[Weight]:
        found = []
        for parameter in part.parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                if id(parameter) not in self._weights:
                    weight = Weight(parameter, self._device, self.dtype)
                    self._weights[id(parameter)] = weight
                found.append(self._weights[id(parameter)])
        return found

    def _find_owners(self, module: nn.Module) -> None:
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                weight = self._weights.get(id(parameter))
                if weight is not None:
                    weight.owners.append((owner, name))
                    owner.__dict__.setdefault(_HELD, {})[name] = weight

    def enter(self, part: Part) -> None:
        """Have a part in memory, until `leave`."""
        part.users += 1
        if part in self._loaded:
            self._loaded[part] = self._loaded.pop(part)  # the last one used
        else:
            self._load(part)
            self._make_room()

    def leave(self, part: Part) -> None:
        """Say that a call of a part has ended."""
        part.users -= 1
        self._make_room()

    @contextmanager
    def hold(self, module: nn.Module) -> Iterator[None]:
        """Have the parts that `module` is, or consists of, in memory inside."""
        forwards = [vars(inner).get("forward") for inner in module.modules()]
        parts = [forward.part for forward in forwards if isinstance(forward, HeldForward)]
        for part in parts:
            self.enter(part)
        try:
            yield
        finally:
            for part in parts:
                self.leave(part)

    def restore(self) -> None:
        """Have the dense model again."""
        for weight in self._weights.values():
            if weight.source is not weight.stored:
                weight.write(weight.stored)

    def give_back(self) -> None:
        """Give memory back that nothing needs: the heap's, and pages of what is not computed with.

        Pages are read again when they are needed; without a limit they stay.
        """
        if self.limit is None:
            return
        for weight in self._weights.values():
            if weight.current is None or weight.current.dtype != weight.stored.dtype:
                self._files.drop_pages(weight.stored)
        trim_heap()

    def pin(self) -> None:
        """Keep all weights in memory for good; `set_weight` then writes in place."""
        for weight in self._weights.values():
            weight.pin()

    def _load(self, part: Part) -> None:
        for weight in part.weights:
            weight.load()
            if weight.current is not None and weight.current.dtype != weight.stored.dtype:
                self._files.drop_pages(weight.stored)
        self._loaded[part] = None

    def _unload(self, part: Part) -> None:
        for weight in part.weights:
            weight.unload()
            self._files.drop_pages(weight.stored)
        sources = [w.source for w in part.weights if isinstance(w.source, MakesRows)]
        mapped = MappedFiles() if sources else self._files
        for source in sources:
            source.drop_pages(mapped)
        del self._loaded[part]

    def _make_room(self) -> None:
        if self.limit is None:
            return
        used = sum(part.nbytes for part in self._loaded)
        idle = [part for part in self._loaded if not part.users]
        gone = False
        while used > self.limit and idle:
            part = idle.pop(0)
            self._unload(part)
            used -= part.nbytes
            gone = True
        if gone:
            trim_heap()


class HeldForward:
    """The forward of a part: in memory while it runs.

    An object rather than a function, so that a copied model calls the forward of its own part.
    """

    def __init__(self, resident: ResidentWeights, part: Part, own: Callable[..., Any]) -> None:
        functools.update_wrapper(self, own)
        self._resident, self.part, self._own = resident, part, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._resident.enter(self.part)
        try:
            return self._own(*args, **kwargs)
        finally:
            self._resident.leave(self.part)


class _LookUp(HeldForward):
    """The forward of a plain embedding: rows are looked up where they are stored, and converted."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        (weight,) = self.part.weights
        source = weight.source
        if weight.current is None and len(args) == 1:
            if isinstance(source, Tensor):
                rows = functional.embedding(args[0].to(source.device), source)
                return rows.to(args[0].device, self._resident.dtype)
            if isinstance(source, MakesRows):
                return source.take_rows(args[0]).to(args[0].device, self._resident.dtype)
        return super().__call__(*args, **kwargs)


def _wrap_forward(resident: ResidentWeights, part: Part, module: nn.Module) -> HeldForward:
    plain = type(module) is nn.Embedding and module.max_norm is None and len(part.weights) == 1
    return (_LookUp if plain else HeldForward)(resident, part, module.forward)


def find_weight(module: nn.Module, name: str = "weight") -> Weight | None:
    """Return what manages a parameter of a module; None where nothing does."""
    held = module.__dict__.get(_HELD)
    return None if held is None else held.get(name)
