"""Follow hidden states through the blocks of a model without knowing how it calls them.

The model's own forward runs, with the forwards of some blocks replaced: what is not needed hands on
its input, the first block that is needed receives a hidden state from outside, and an exception
ends the pass once the result is there. This is right only where the blocks are a chain,

    h_0 = embed(ids),   h_{b+1} = block_b(h_b),   output = head(h_B),

each called once, in order, with nothing but h handed on from one to the next. Families that share
keys between blocks, repeat a block or interleave it with other layers are none. `find_break`
compares the way through the chain with a plain forward pass, from which a chain does not differ.

A chain may be a single block, which is most of the model. Where such a block takes token ids,
rather than hidden states, h_0 is what the token embedding gives: the embedding hands it on in its
first call.

Cost of `find_break`: two forward passes of a few tokens. Limits: extra results of a block (the
position bias of T5) are those of the first batch; where they matter, the check finds a break.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

Result = TypeVar("Result")
#: runs the model on a batch
Run = Callable[[], Any]

#: tokens of the batch that shows a block's results, and of the one that is compared
_SHOWN, _COMPARED = 8, 12
#: largest difference from a plain pass, as a share of its largest output: a chain has none, but
#: kernels of an accelerator need not repeat themselves to the bit
_CLOSE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arguments:
    """What a block is called with. `embedded`: what the token embedding is to give inside it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    embedded: Tensor | None = None


#: receives the arguments and the real forward
Replacement = Callable[[Arguments, Callable[..., Any]], Any]


class _StopForward(Exception):
    """The forward pass has produced the requested value."""


class Chain:
    """The blocks of a model, in order.

    Args:
        blocks: the modules.
        embeddings: modules that may be the token embedding, for a block that takes token ids.
        run: runs the model on a batch, which shows what blocks take and return; block 0 runs.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], embeddings: Sequence[nn.Module], run: Run
    ) -> None:
        self._blocks = list(blocks)
        self._embedding: nn.Module | None = None
        self._shown: Any = None
        self._look(embeddings, run)

    @torch.no_grad()
    def _look(self, embeddings: Sequence[nn.Module], run: Run) -> None:
        """Keep what block 0 returns, whose results beside the hidden state are handed on, and
        which embedding runs in it."""
        called: list[nn.Module] = []

        def look(given: Arguments, forward: Callable[..., Any]) -> None:
            called.clear()
            self._shown = forward(*given.args, **given.kwargs)
            if not _takes_hidden(given):
                assert called, "the block looks no tokens up"
                self._embedding = called[0]

        with ExitStack() as stack:
            for embedding in embeddings:
                hook = embedding.register_forward_hook(lambda part, *_: called.append(part))
                stack.callback(hook.remove)
            self._capture(0, look, run)

    @torch.no_grad()
    def embed(self, run: Run) -> Tensor:
        """Return the input of block 0, (rows, tokens, width)."""
        if self._embedding is None:
            return self._capture(0, lambda given, _forward: _get_hidden_input(given), run)

        def look_up(given: Arguments, forward: Callable[..., Any]) -> Tensor:
            return _get_hidden_output(forward(*given.args, **given.kwargs))

        return _capture([self._embedding], 0, look_up, {}, run)

    def take_arguments(self, block: int, hidden: Tensor, run: Run) -> Arguments:
        """Return what the model calls a block with, its hidden state replaced."""
        return self._capture(block, lambda given, _forward: self._replace(given, hidden), run)

    def run_block(self, block: int, hidden: Tensor, run: Run) -> Tensor:
        """Run one block alone; return its output hidden state."""

        def run_it(given: Arguments, forward: Callable[..., Any]) -> Tensor:
            return self._call(forward, self._replace(given, hidden))

        return self._capture(block, run_it, run)

    def call(self, block: int, arguments: Arguments) -> Tensor:
        """Run a block on arguments that were taken; return its output hidden state."""
        return self._call(self._blocks[block], arguments)

    def run_from(self, block: int, hidden: Tensor, run: Run) -> Any:
        """Return the model's output, given the input of `block`, or the last one's output."""
        last = len(self._blocks) - 1

        def enter(given: Arguments, forward: Callable[..., Any]) -> Any:
            if block > last:
                return self._wrap(hidden)
            arguments = self._replace(given, hidden)
            with self._hand_on(arguments.embedded):
                return forward(*arguments.args, **arguments.kwargs)

        entry = min(block, last)
        with _replace_forwards(self._blocks, self._make_skips(entry) | {entry: enter}):
            return run()

    def _call(self, forward: Callable[..., Any], arguments: Arguments) -> Tensor:
        with self._hand_on(arguments.embedded):
            return _get_hidden_output(forward(*arguments.args, **arguments.kwargs))

    @contextmanager
    def _hand_on(self, embedded: Tensor | None) -> Iterator[None]:
        """Let the token embedding give `embedded` in its first call, and itself afterwards.

        Passes may wait for each other inside a block (`compression.streams`): what is replaced is
        put back at the first call, before a pass can wait.
        """
        with ExitStack() as stack:
            if embedded is not None:
                assert self._embedding is not None

                def give(_given: Arguments, _forward: Callable[..., Any]) -> Tensor:
                    stack.close()
                    return embedded

                stack.enter_context(_replace_forwards([self._embedding], {0: give}))
            yield

    def _replace(self, given: Arguments, hidden: Tensor) -> Arguments:
        if self._embedding is not None:
            return replace(given, embedded=hidden)
        if given.args:
            return replace(given, args=(hidden, *given.args[1:]))
        return replace(given, kwargs=given.kwargs | {"hidden_states": hidden})

    def _wrap(self, hidden: Tensor) -> Any:
        """Return a block's results with another hidden state."""
        shown = self._shown
        if isinstance(shown, ModelOutput):
            return type(shown)(**(dict(shown) | {next(iter(shown)): hidden}))
        return type(shown)((hidden, *shown[1:])) if isinstance(shown, tuple | list) else hidden

    def _make_skips(self, before: int) -> dict[int, Replacement]:
        def skip(given: Arguments, _forward: Callable[..., Any]) -> Any:
            return self._wrap(_get_hidden_input(given))

        return dict.fromkeys(range(before), skip)

    def _capture(self, block: int, replacement: Callable[..., Result], run: Run) -> Result:
        return _capture(self._blocks, block, replacement, self._make_skips(block), run)


def _capture(
    modules: Sequence[nn.Module],
    index: int,
    replacement: Callable[..., Result],
    skips: Mapping[int, Replacement],
    run: Run,
) -> Result:
    """Return what `replacement` returns in the place of a module; the forward ends there."""
    captured: list[Result] = []

    def stop(given: Arguments, forward: Callable[..., Any]) -> Any:
        captured.append(replacement(given, forward))
        raise _StopForward

    try:
        with _replace_forwards(modules, {**skips, index: stop}):
            run()
    except _StopForward:
        return captured[0]
    raise AssertionError(f"block {index} was never called")


@contextmanager
def _replace_forwards(
    blocks: Sequence[nn.Module], replacements: Mapping[int, Replacement]
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
        return replacement(Arguments(args=args, kwargs=kwargs), run)

    return forward


def _takes_hidden(given: Arguments) -> bool:
    hidden = given.args[0] if given.args else given.kwargs.get("hidden_states")
    return isinstance(hidden, Tensor) and hidden.is_floating_point()


def _get_hidden_input(given: Arguments) -> Tensor:
    hidden = given.args[0] if given.args else given.kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def _get_hidden_output(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple | list | ModelOutput) else output
    assert isinstance(hidden, Tensor)
    return hidden


def list_token_embeddings(module: nn.Module) -> list[nn.Module]:
    """Return the token embedding, and modules that look up in the same matrix (T5's encoder)."""
    first: nn.Module = module.get_input_embeddings()  # type: ignore[operator]
    weight = getattr(first, "weight", None)
    same = [part for part in module.modules() if getattr(part, "weight", None) is weight]
    return [first, *(part for part in same if isinstance(part, nn.Embedding) and part is not first)]


@torch.no_grad()
def find_break(module: nn.Module, blocks: Sequence[str]) -> str | None:
    """Return why these blocks of a model are no chain; None if they are one.

    Two batches of different lengths run, one to learn what blocks return, one with padding to
    compare.
    """
    parts = [module.get_submodule(name) for name in blocks]
    try:
        embeddings = list_token_embeddings(module)
        shown, compared = (_make_run(module, tokens) for tokens in (_SHOWN, _COMPARED))
        plain = _get_answer(compared())
        chain = Chain(parts, embeddings, shown)
        hidden = chain.embed(compared)
        for block in range(len(parts)):
            hidden = chain.run_block(block, hidden, compared)
        found = _get_answer(chain.run_from(len(parts), hidden, compared))
    except Exception as error:  # a family's code, called in an unusual way, can raise anything
        return f"a block alone raises {type(error).__name__}"
    if not bool(plain.isfinite().all()):
        return None  # nothing can be compared; a later pass names the layer
    if found.shape != plain.shape:
        return "outputs have another shape"
    furthest = float((found - plain).abs().max() / plain.abs().max().clamp_min(1e-30))
    return f"outputs differ by {furthest:.2g} of the largest" if not furthest <= _CLOSE else None


def _make_run(module: nn.Module, tokens: int) -> Run:
    """Return a forward pass on a row of tokens, of which the longer one ends with padding."""
    device = next(module.parameters()).device
    embedding: Any = module.get_input_embeddings()  # type: ignore[operator]
    ids = (torch.arange(tokens, device=device) * 7 + 3).remainder(embedding.num_embeddings)[None]
    mask = torch.ones_like(ids)
    mask[:, _SHOWN + 1 :] = 0
    takes = "use_cache" in inspect.signature(module.forward).parameters
    extra = {"use_cache": False} if takes else {}
    return lambda: module(input_ids=ids, attention_mask=mask, **extra)


def _get_answer(output: Any) -> Tensor:
    """Return the output at tokens that are not padding, float32."""
    logits = getattr(output, "logits", None)
    answer = output[0] if logits is None else logits
    assert isinstance(answer, Tensor)
    per_token = answer.ndim == 3 and answer.shape[1] == _COMPARED
    return (answer[:, : _SHOWN + 1] if per_token else answer).float()
