"""Running a model from the middle: one block alone, or everything after a given hidden state.

Nothing is assumed about how a family calls its blocks (masks, rotary tables, caches, extra
arguments): the model's own forward runs, but blocks that are not wanted are short-circuited. They
hand on what they are given, the first wanted block is handed the hidden state that the caller
holds, and a forward that has given what was asked for is stopped by an exception. What is paid for
beyond the wanted blocks is the embedding lookup and the masks.

Limits: a block's first argument and first result are the hidden state, of one shape for all
blocks, which holds for every family in `checkpoint.architectures`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from cptq.calibration.tokens import Batch
from cptq.checkpoint.model import LoadedModel

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
#: replaces a block's forward: gets the arguments and the real forward
Stand = Callable[[Arguments, Callable[..., Any]], Any]


class _Stop(Exception):
    """The forward pass has given what was asked for."""


class BlockReplay:
    """Replays blocks of `model` on `batches`; creating one runs block 0 on the first batch."""

    def __init__(self, model: LoadedModel, batches: list[Batch]) -> None:
        self.model = model
        self.batches = batches
        self._rest = self._results_beside_hidden()

    @torch.no_grad()
    def embed(self, batch_index: int) -> Tensor:
        """The input of block 0, (rows, tokens, width)."""

        def catch(arguments: Arguments, _run: Callable[..., Any]) -> Tensor:
            return _hidden_in(arguments)

        return self._caught(0, catch, batch_index)

    @torch.no_grad()
    def run(self, block: int, hidden: Tensor, batch_index: int) -> Tensor:
        """Block `block` alone: hidden state in, hidden state out."""

        def only(arguments: Arguments, run: Callable[..., Any]) -> Tensor:
            args, kwargs = _with_hidden(arguments, hidden)
            return _hidden_out(run(*args, **kwargs))

        return self._caught(block, only, batch_index)

    def run_from(self, block: int, hidden: Tensor, batch_index: int) -> Any:
        """The model's output, given the input of `block`.

        `block` equal to the number of blocks runs only what follows the last one. Gradients flow
        unless the caller has disabled them.
        """
        last = len(self.model.blocks) - 1

        def enter(arguments: Arguments, run: Callable[..., Any]) -> Any:
            if block > last:
                return self._result(hidden)
            args, kwargs = _with_hidden(arguments, hidden)
            return run(*args, **kwargs)

        entry = min(block, last)
        return self._forward(self._skips(entry) | {entry: enter}, batch_index)

    def finish(self, hidden: Tensor, batch_index: int) -> Any:
        """The model's output from the last block's output."""
        return self.run_from(len(self.model.blocks), hidden, batch_index)

    @torch.no_grad()
    def _results_beside_hidden(self) -> tuple[Any, ...] | None:
        """What a block returns after its hidden state; None where it returns a bare tensor."""
        rest: list[tuple[Any, ...] | None] = []

        def look(arguments: Arguments, run: Callable[..., Any]) -> Tensor:
            args, kwargs = arguments
            output = run(*args, **kwargs)
            rest.append(output[1:] if isinstance(output, tuple) else None)
            return _hidden_out(output)

        self._caught(0, look, 0)
        return rest[0]

    def _result(self, hidden: Tensor) -> Any:
        return hidden if self._rest is None else (hidden, *self._rest)

    def _skips(self, before: int) -> dict[int, Stand]:
        def skip(arguments: Arguments, _run: Callable[..., Any]) -> Any:
            return self._result(_hidden_in(arguments))

        return dict.fromkeys(range(before), skip)

    def _caught(self, block: int, stand: Stand, batch_index: int) -> Tensor:
        """What `stand` gives at `block`; the forward ends there."""
        caught: list[Tensor] = []

        def stop(arguments: Arguments, run: Callable[..., Any]) -> Any:
            caught.append(stand(arguments, run))
            raise _Stop

        skips = self._skips(block) if block else {}
        try:
            self._forward(skips | {block: stop}, batch_index)
        except _Stop:
            return caught[0]
        raise AssertionError(f"block {block} was never called")

    def _forward(self, stands: Mapping[int, Stand], batch_index: int) -> Any:
        with _standing_in(self.model.blocks, stands):
            return forward(self.model, self.batches[batch_index])


def forward(model: LoadedModel, batch: Batch) -> Any:
    """The model's output for a batch, without a key-value cache."""
    extra = {"use_cache": False} if model.kind == "causal-lm" else {}
    return model.module(**batch, **extra)


def body(model: LoadedModel, batch: Batch) -> Tensor:
    """Run the model for what hooks see of its units; what comes out last.

    An output head that holds no unit is left out: of a language model it is a fifth of the work
    (smollm2-135m).
    """
    prefix = f"{model.module.base_model_prefix}."
    inside = all(spec.name.startswith(prefix) for unit in model.units for spec in unit.layers)
    if not inside or model.kind != "causal-lm":
        return cast(Tensor, forward(model, batch)[0])
    return cast(Tensor, model.module.base_model(**batch, use_cache=False)[0])  # type: ignore[operator]


@contextmanager
def _standing_in(blocks: list[nn.Module], stands: Mapping[int, Stand]) -> Iterator[None]:
    """Each block in `stands` runs its stand-in instead of its own forward."""
    # a forward on the instance is somebody's hook (accelerate's, say) and comes back as well
    own = {index: vars(blocks[index]).get("forward") for index in stands}
    for index, stand in stands.items():
        blocks[index].forward = _bound(stand, blocks[index].forward)
    try:
        yield
    finally:
        for index, before in own.items():
            if before is None:
                del blocks[index].forward  # the class's method is back
            else:
                blocks[index].forward = before


def _bound(stand: Stand, run: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return stand((args, kwargs), run)

    return forward


def _hidden_in(arguments: Arguments) -> Tensor:
    args, kwargs = arguments
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def _hidden_out(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def _with_hidden(arguments: Arguments, hidden: Tensor) -> Arguments:
    args, kwargs = arguments
    return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})
