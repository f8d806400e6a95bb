"""Run part of a model: one block alone, or everything after a given hidden state.

Nothing is assumed about how a family calls its blocks (masks, rotary tables, caches, extra
arguments): the model's own forward runs, but blocks that are not needed are short-circuited. They
return their input, the first needed block receives the hidden state that the caller provides, and
an exception stops the forward once the result is there. The overhead beyond the needed blocks is
the embedding lookup and the masks.

Limits: a block's first argument and first result are the hidden state, of one shape for all
blocks, which holds for every family in `checkpoint.architectures`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cptq.calibration.batches import Batch
from cptq.checkpoint.model import LoadedModel

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Result = TypeVar("Result")
#: replaces a block's forward: receives the arguments and the real forward
Replacement = Callable[[Arguments, Callable[..., Any]], Any]


class _StopForward(Exception):
    """The forward pass has produced the requested value."""


class BlockReplay:
    """Replays blocks of `model` on `batches`; creating one runs block 0 on the first batch,
    if there is one.

    `positions`: of every batch, those at which logits are wanted, where the model can leave out the
    others; all of them without.
    """

    def __init__(
        self,
        model: LoadedModel,
        batches: list[Batch],
        positions: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.model = model
        self.batches = batches
        self._positions = positions or [None] * len(batches)
        self._extra = self._get_extra_results() if batches else None

    @torch.no_grad()
    def embed(self, batch_index: int) -> Tensor:
        """Return the input of block 0, (rows, tokens, width)."""

        def take_input(arguments: Arguments, _run: Callable[..., Any]) -> Tensor:
            return _get_hidden_input(arguments)

        return self._capture(0, take_input, batch_index)

    @torch.no_grad()
    def run(self, block: int, hidden: Tensor, batch_index: int) -> Tensor:
        """Run one block alone; return its output hidden state."""

        def run_block(arguments: Arguments, run: Callable[..., Any]) -> Tensor:
            args, kwargs = _replace_hidden(arguments, hidden)
            return _get_hidden_output(run(*args, **kwargs))

        return self._capture(block, run_block, batch_index)

    @torch.no_grad()
    def take_arguments(self, block: int, hidden: Tensor, batch_index: int) -> Arguments:
        """Return what the model calls a block with, its hidden state replaced by `hidden`.

        For a caller that runs the block itself, outside of the model's forward.
        """

        def take(arguments: Arguments, _run: Callable[..., Any]) -> Arguments:
            return _replace_hidden(arguments, hidden)

        return self._capture(block, take, batch_index)

    def call(self, block: int, arguments: Arguments) -> Tensor:
        """Run a block on arguments that were taken; return its output hidden state."""
        args, kwargs = arguments
        return _get_hidden_output(self.model.blocks[block](*args, **kwargs))

    def run_from(self, block: int, hidden: Tensor, batch_index: int) -> Any:
        """Return the model's output, given the input of `block`.

        With `block` equal to the number of blocks only what follows the last one runs. Gradients
        flow unless the caller has disabled them.
        """
        last = len(self.model.blocks) - 1

        def enter(arguments: Arguments, run: Callable[..., Any]) -> Any:
            if block > last:
                return self._wrap_hidden(hidden)
            args, kwargs = _replace_hidden(arguments, hidden)
            return run(*args, **kwargs)

        entry = min(block, last)
        return self._forward(self._make_skips(entry) | {entry: enter}, batch_index)

    def finish(self, hidden: Tensor, batch_index: int) -> Any:
        """Return the model's output, given the last block's output."""
        return self.run_from(len(self.model.blocks), hidden, batch_index)

    @torch.no_grad()
    def _get_extra_results(self) -> tuple[Any, ...] | None:
        """Return what a block returns beside its hidden state; None if it returns a bare tensor."""
        rest: list[tuple[Any, ...] | None] = []

        def look(arguments: Arguments, run: Callable[..., Any]) -> Tensor:
            args, kwargs = arguments
            output = run(*args, **kwargs)
            rest.append(output[1:] if isinstance(output, tuple) else None)
            return _get_hidden_output(output)

        self._capture(0, look, 0)
        return rest[0]

    def _wrap_hidden(self, hidden: Tensor) -> Any:
        return hidden if self._extra is None else (hidden, *self._extra)

    def _make_skips(self, before: int) -> dict[int, Replacement]:
        def skip(arguments: Arguments, _run: Callable[..., Any]) -> Any:
            return self._wrap_hidden(_get_hidden_input(arguments))

        return dict.fromkeys(range(before), skip)

    def _capture(self, block: int, replacement: Callable[..., Result], batch_index: int) -> Result:
        """Return what `replacement` returns at `block`; the forward ends there."""
        captured: list[Result] = []

        def stop(arguments: Arguments, run: Callable[..., Any]) -> Any:
            captured.append(replacement(arguments, run))
            raise _StopForward

        skips = self._make_skips(block) if block else {}
        try:
            self._forward(skips | {block: stop}, batch_index)
        except _StopForward:
            return captured[0]
        raise AssertionError(f"block {block} was never called")

    def _forward(self, replacements: Mapping[int, Replacement], batch_index: int) -> Any:
        with _replace_forwards(self.model.blocks, replacements):
            return forward(self.model, self.batches[batch_index], self._positions[batch_index])


def forward(model: LoadedModel, batch: Batch, positions: Tensor | None = None) -> Any:
    """Return the model's output for a batch, without a key-value cache.

    `positions`: those at which logits are wanted; a model that cannot leave out the others gives
    all of them.
    """
    extra: dict[str, Any] = {"use_cache": False} if model.kind == "causal-lm" else {}
    if (
        positions is not None
        and "logits_to_keep" in inspect.signature(model.module.forward).parameters
    ):
        extra["logits_to_keep"] = positions
    return model.module(**batch, **extra)


@contextmanager
def _replace_forwards(
    blocks: list[nn.Module], replacements: Mapping[int, Replacement]
) -> Iterator[None]:
    """Run each block's replacement instead of its own forward."""
    # a forward on the instance is a hook of another library (accelerate's, say): restore it as well
    own = {index: vars(blocks[index]).get("forward") for index in replacements}
    for index, replacement in replacements.items():
        blocks[index].forward = _bind(replacement, blocks[index].forward)
    try:
        yield
    finally:
        for index, before in own.items():
            if before is None:
                del blocks[index].forward  # the class's method is back
            else:
                blocks[index].forward = before


def _bind(replacement: Replacement, run: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return replacement((args, kwargs), run)

    return forward


def _get_hidden_input(arguments: Arguments) -> Tensor:
    args, kwargs = arguments
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def _get_hidden_output(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def _replace_hidden(arguments: Arguments, hidden: Tensor) -> Arguments:
    args, kwargs = arguments
    return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})
