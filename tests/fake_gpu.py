"""A GPU that is none: tensors in the CPU's memory that pass for tensors on `cuda:0`.

    with pretend_gpu():
        x = torch.ones(3, device="cuda")    # x.device is cuda:0
        x + torch.ones(3)                   # RuntimeError, as on a GPU

Where a tensor lies is a mark of its storage, so views, parameters and `x.data = y` keep it. A mode
of torch sees every call of a function (`_Functions`): it answers `device`, carries out moves, takes
`device="cuda"` from factories, refuses what CUDA refuses and marks results. In a backward pass,
where no function is called, another one marks what the operators make (`_Operators`).

Refused, as torch refuses it on CUDA:
- tensors of both devices in one call, except for CPU scalars (no dimensions) among what is
  computed element by element, CPU indices into a GPU tensor, and `copy_`;
- `numpy()` and what NumPy makes of a tensor on the GPU;
- a CPU generator for random numbers on the GPU;
- products of matrices of integers.

Limits: kernels, their rounding and their speed are the CPU's; addresses (`data_ptr`) are not
checked; what a new process does is not seen. Threads of a `ThreadPoolExecutor` take part.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
MEMORY = 80 << 30
#: what may be given tensors of both devices
_MIXING = {
    *("copy_", "to", "type_as", "__set__", "new_tensor", "tensor", "as_tensor", "swap_tensors"),
    *("expand_as", "view_as", "reshape_as", "_has_compatible_shallow_copy_type", "_make_subclass"),
    *("is_same_size", "result_type", "__setitem__", "backward", "grad"),
}
#: what takes indices
_INDEXING = {"__getitem__", "index_put", "index_put_", "index"}
#: what takes no CPU scalar beside a tensor on the GPU
_STRICT = {
    *(
        "cat",
        "concat",
        "stack",
        "hstack",
        "vstack",
        "gather",
        "scatter",
        "scatter_",
        "index_select",
    ),
    *("index_add", "index_add_", "searchsorted", "bucketize", "mm", "matmul", "linear", "addmm_"),
}
#: what makes a tensor of numbers, or of another tensor
_MAKING = {"tensor", "as_tensor", "asarray"}
_PRODUCTS = {
    "mm",
    "matmul",
    "__matmul__",
    "bmm",
    "addmm",
    "addmm_",
    "linear",
    "einsum",
    "dot",
    "mv",
}
_INTEGERS = {torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64}


class _Marks:
    """Which storages lie on the GPU. A weak reference keeps an address from being used again."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}
        self._most = 1024

    def has(self, tensor: Tensor) -> bool:
        key = _find_storage(tensor)
        return key is not None and key._cdata in self._known

    def add(self, tensor: Tensor) -> None:
        storage = _find_storage(tensor)
        if storage is None or storage.device.type != "cpu":
            return
        self._known[storage._cdata] = StorageWeakRef(storage)
        if len(self._known) > self._most:
            self._known = {key: ref for key, ref in self._known.items() if not ref.expired()}
            self._most = 2 * len(self._known) + 1024

    def add_new(self, found: Any, given: list[Tensor]) -> None:
        """Mark the tensors that share no memory with those that a call was given."""
        made = _list_tensors(found)
        if made:
            old = {getattr(_find_storage(tensor), "_cdata", 0) for tensor in given}
            for tensor in made:
                if getattr(_find_storage(tensor), "_cdata", 0) not in old:
                    self.add(tensor)


def _find_storage(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):  # sparse, or inside of vmap
        return None


def _list_tensors(value: Any, found: list[Tensor] | None = None) -> list[Tensor]:
    """All tensors in nested lists, tuples and dictionaries; a list that begins with a number has
    none."""
    found = [] if found is None else found
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, list | tuple):
        if not (value and isinstance(value[0], int | float)) or isinstance(value, tuple):
            for item in value:
                _list_tensors(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _list_tensors(item, found)
    return found


class _State(threading.local):
    """Where the call under way makes what is new: None where its inputs say so."""

    on_gpu: bool | None = None


class _Operators(TorchDispatchMode):
    """Marks what an operator makes of what lies on the GPU: in a backward pass no function is
    called that the other mode could see."""

    def __init__(self, marks: _Marks, state: _State) -> None:
        super().__init__()
        self._marks, self._state = marks, state

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = _list_tensors([args, kwargs or {}])
        on_gpu = self._state.on_gpu
        if on_gpu is None:
            on_gpu = any(self._marks.has(tensor) for tensor in given)
        if on_gpu:
            self._marks.add_new(found, given)
        return found


class _Move(torch.autograd.Function):
    """A copy on the other device; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mode: _Functions, on_gpu: bool) -> Tensor:
        ctx.mode, ctx.on_gpu = mode, on_gpu
        return mode.copy(x, on_gpu)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.mode.copy(gradients[0], not ctx.on_gpu), None, None


class _Functions(TorchFunctionMode):
    """Answers, moves, refuses."""

    def __init__(self, marks: _Marks, state: _State) -> None:
        super().__init__()
        self.marks, self._state = marks, state

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, torch._ops.OpOverload):  # from `_Operators`
            return func(*args, **kwargs)
        owner = getattr(func, "__self__", None)
        if owner in _ATTRIBUTES and func.__name__ == "__get__":
            return _ATTRIBUTES[owner](self.marks.has(args[0]), func, args)
        name = func.__name__
        if name in _METHODS and args and isinstance(args[0], Tensor):
            return _METHODS[name](self, func, args, kwargs)
        kwargs.pop("pin_memory", None)
        asked = _read_device(kwargs.get("device"))
        if asked is not None and asked.type in ("cuda", "cpu"):
            kwargs["device"] = "cpu"
        tensors = _list_tensors([args, kwargs])
        marked = [self.marks.has(tensor) for tensor in tensors]
        on_gpu = any(marked) if asked is None else asked.type == "cuda"
        self._refuse_generator(args, kwargs, on_gpu)
        if asked is None and any(marked):
            self._refuse(name, args, kwargs, tensors, marked)
        found = self._call(on_gpu, func, args, kwargs)
        if name in _MAKING and asked is not None and found.device.type == "cpu":
            return self.move(found, on_gpu)
        if on_gpu:
            self.marks.add_new(found, tensors)
        return found

    def _call(self, on_gpu: bool | None, func: Any, args: Any, kwargs: Any) -> Any:
        before, self._state.on_gpu = self._state.on_gpu, on_gpu
        try:
            return func(*args, **kwargs)
        finally:
            self._state.on_gpu = before

    def copy(self, x: Tensor, on_gpu: bool) -> Tensor:
        """A copy that lies there."""
        with torch._C.DisableTorchFunction():  # a backward pass calls with this mode in force
            found: Tensor = self._call(on_gpu, torch.clone, (x.detach(),), {})
        if on_gpu:
            self.marks.add(found)
        return found

    def move(self, x: Tensor, on_gpu: bool, *, copy: bool = False) -> Tensor:
        """The tensor there, itself if it lies there and no copy is asked for."""
        if x.device.type != "cpu":
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        if self.marks.has(x) == on_gpu and not copy:
            return x
        found: Tensor = _Move.apply(x, self, on_gpu)
        return found

    def convert(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`x.to(...)`: the device first, then what else is asked for."""
        x, *rest = args
        asked = None
        if "device" in kwargs:
            asked = _read_device(kwargs.pop("device"))
        elif rest and not isinstance(rest[0], torch.dtype):
            first = rest.pop(0)
            if isinstance(first, Tensor):
                asked = GPU if self.marks.has(first) else first.device
                rest.insert(0, first.dtype)
            else:
                asked = _read_device(first)
        if asked is not None and asked.type not in ("cuda", "cpu"):
            return func(x, asked, *rest, **kwargs)
        on_gpu = self.marks.has(x) if asked is None else asked.type == "cuda"
        x = self.move(x, on_gpu) if asked is not None else x
        rest = [value for value in rest if value is not None]
        if rest and isinstance(rest[0], bool):  # non_blocking, copy
            return self.move(x, on_gpu, copy=len(rest) > 1 and rest[1])
        if not rest and not kwargs:
            return x
        found = self._call(on_gpu, func, (x, *rest), kwargs)
        if on_gpu:
            self.marks.add_new(found, [x])
        return found

    def _refuse_generator(self, args: Any, kwargs: Any, on_gpu: bool) -> None:
        if on_gpu and any(isinstance(each, torch.Generator) for each in (*args, *kwargs.values())):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")

    def _refuse(
        self, name: str, args: Any, kwargs: Any, tensors: list[Tensor], marked: list[bool]
    ) -> None:
        """Raise what a GPU raises; one of the tensors is on it."""
        if name in _PRODUCTS and all(tensor.dtype in _INTEGERS for tensor in tensors):
            raise RuntimeError(f'"addmm_cuda" not implemented for {tensors[0].dtype}')
        if all(marked) or name in _MIXING:
            return
        if name in _INDEXING:
            if not marked[0]:
                raise RuntimeError(
                    "indices should be either on cpu or on the same device as the indexed tensor "
                    "(cpu)"
                )
            if name == "__getitem__" or all(self.marks.has(x) for x in _list_tensors(args[2:])):
                return
        changed = _list_tensors(kwargs.get("out"))
        if name.endswith("_") and not name.endswith("__"):
            changed += _list_tensors(args[:1])
        plain = [tensor for tensor, on_gpu in zip(tensors, marked, strict=True) if not on_gpu]
        if (
            name in _STRICT
            or any(tensor.ndim for tensor in plain)
            or any(not self.marks.has(tensor) for tensor in changed)
        ):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! (in {name})"
            )


def _read_device(value: Any) -> torch.device | None:
    if value is None:
        return None
    device = torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
    if device.type == "cuda" and device.index not in (None, 0):
        raise RuntimeError("CUDA error: invalid device ordinal")
    return device


def _to_numpy(mode: _Functions, func: Any, args: Any, kwargs: Any) -> Any:
    if mode.marks.has(args[0]):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )
    return func(*args, **kwargs)


def _read_attribute(of_gpu: Any) -> Callable[[bool, Any, Any], Any]:
    return lambda on_gpu, func, args: of_gpu if on_gpu else func(*args)


_ATTRIBUTES = {
    torch.Tensor.device: _read_attribute(GPU),
    torch.Tensor.is_cuda: _read_attribute(True),
    torch.Tensor.is_cpu: _read_attribute(False),
}
_METHODS: dict[str, Callable[[_Functions, Any, Any, Any], Any]] = {
    "to": _Functions.convert,
    "cpu": lambda mode, func, args, kwargs: mode.move(args[0], False),
    "cuda": lambda mode, func, args, kwargs: mode.move(args[0], True),
    "get_device": lambda mode, func, args, kwargs: 0 if mode.marks.has(args[0]) else -1,
    "numpy": _to_numpy,
    "__array__": _to_numpy,
}


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """Have a GPU inside."""
    marks, state = _Marks(), _State()
    properties = SimpleNamespace(
        name="a GPU that is none", total_memory=MEMORY, major=9, minor=0, multi_processor_count=132
    )
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 1 << 20,
        "memory_allocated": lambda device=None: 1 << 20,
        "memory_reserved": lambda device=None: 1 << 20,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda *_: True,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "device_of": lambda tensor: nullcontext(),
        "device": lambda device: nullcontext(),
    }
    accelerator = {
        "is_available": lambda: True,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "device_count": lambda: 1,
        "current_device_index": lambda: 0,
    }

    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        for name, answer in accelerator.items():
            patch.setattr(torch.accelerator, name, answer)
        _enter_callbacks(patch, marks, state)
        with _Functions(marks, state):
            yield


def _enter_callbacks(patch: pytest.MonkeyPatch, marks: _Marks, state: _State) -> None:
    """Let the modes see backward passes with their hooks, and the threads of a pool."""
    run, submit = torch.autograd._engine_run_backward, ThreadPoolExecutor.submit

    def run_backward(roots: Any, gradients: Any, *args: Any, **kwargs: Any) -> Any:
        before, state.on_gpu = state.on_gpu, None
        for root, gradient in zip(roots, gradients, strict=True):
            if gradient is not None and marks.has(root):
                marks.add(gradient)
        try:
            with _Functions(marks, state), _Operators(marks, state):
                return run(roots, gradients, *args, **kwargs)
        finally:
            state.on_gpu = before

    def submit_here(pool: Any, task: Any, /, *args: Any, **kwargs: Any) -> Any:
        def run_task(*given: Any, **named: Any) -> Any:
            with _Functions(marks, state):
                return task(*given, **named)

        return submit(pool, run_task, *args, **kwargs)

    patch.setattr(torch.autograd, "_engine_run_backward", run_backward)
    patch.setattr(ThreadPoolExecutor, "submit", submit_here)
