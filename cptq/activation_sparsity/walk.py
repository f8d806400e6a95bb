"""Fit the rules of a whole model, block by block, each behind blocks that already drop inputs.

For every block: run it on the hidden states that the blocks before it produce with their rules,
keep the inputs of its linears, let the method fit, run it again with its rules. The second run also
counts what each rule drops: that is the share reached on the calibration tokens.

Memory: hidden states and the inputs of one block's linears for `TOKENS` tokens. Cost: two forward
passes over the blocks for these tokens, and what the method takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cptq.activation_sparsity.method import BlockView, Method, Rules
from cptq.calibration.batches import Batch
from cptq.calibration.objective import mask_real_tokens
from cptq.calibration.replay import BlockReplay
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight
from cptq.inference.activations import DroppedInputs
from cptq.layouts.activations import parse_rule
from cptq.numerics.activation_rules import drop_inputs, find_dropped, finish_outputs
from cptq.types import ActivationRule, Emit, LayerSpec, Progress

#: calibration tokens that rules are fitted to, and those that a block's error is measured on
TOKENS, ERROR_TOKENS = 2048, 256
STAGE = "activations"


def find_function(config: Any) -> str:
    """Return the name of a model's activation function; empty where its config names none."""
    text = config.get_text_config()
    for name in ("hidden_act", "hidden_activation", "activation_function", "activation"):
        found = getattr(text, name, None)
        if isinstance(found, str):
            return found
    return ""


@torch.no_grad()
def fit_rules(
    model: LoadedModel,
    batches: Sequence[Batch],
    method: Method,
    share: float,
    labels: Mapping[str, str],
    emit: Emit,
) -> tuple[dict[str, ActivationRule], dict[str, float]]:
    """Fit a rule for each linear of `labels`, {linear: label}.

    Args:
        model: as it computes now; its weights may be compressed.
        batches: calibration text.
        method: of `METHODS`.
        share: of the inputs to drop.
        labels: what `method.list_rules` gave.
        emit: receives progress.

    Returns:
        {linear: rule}, and {linear: share of its inputs that was dropped} of rules on inputs.
    """
    walk = _Walk(model, batches)
    rules: dict[str, ActivationRule] = {}
    reached: dict[str, float] = {}
    for block in range(len(model.blocks)):
        emit(Progress(stage=STAGE, done=block, total=len(model.blocks)))
        layers = [spec for spec in model.layers if spec.block == block]
        own = {spec.name: labels[spec.name] for spec in layers if spec.name in labels}
        found = method.fit(walk.view(block, layers, own, share)) if own else {}
        counts = walk.advance(block, found)
        rules |= found
        reached |= {n: c.share for n, c in counts.items() if parse_rule(own[n]).drops_inputs}
    emit(Progress(stage=STAGE, done=len(model.blocks), total=len(model.blocks)))
    return rules, reached


@contextmanager
def apply_rules(
    model: LoadedModel, rules: Rules, counts: dict[str, DroppedInputs] | None = None
) -> Iterator[None]:
    """Have the dense linears of a model compute by rules inside; count what they drop."""
    with ExitStack() as stack:
        for name, rule in rules.items():
            count = None if counts is None else counts.setdefault(name, DroppedInputs())
            hooks = _RuleHooks(rule, count)
            module = model.linear(name)
            stack.callback(module.register_forward_pre_hook(hooks.enter).remove)
            stack.callback(module.register_forward_hook(hooks.leave).remove)
        yield


class _RuleHooks:
    """What happens before and after a dense linear."""

    def __init__(self, rule: ActivationRule, count: DroppedInputs | None) -> None:
        self._rule, self._tensors, self._count = parse_rule(rule.label), rule.tensors, count
        self._x: Tensor | None = None

    def enter(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace the inputs."""
        self._x = x = args[0]
        self._tensors = {part: value.to(x.device) for part, value in self._tensors.items()}
        if self._count is not None and self._rule.drops_inputs:
            self._count.dropped += int(find_dropped(self._rule, self._tensors, x).sum())
            self._count.total += x.numel()
        return (drop_inputs(self._rule, self._tensors, x), *args[1:])

    def leave(self, _module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """Replace the outputs."""
        x, self._x = self._x, None
        assert x is not None
        return finish_outputs(self._rule, self._tensors, x, args[0], y)


class _Walk:
    """Calibration tokens on their way through the blocks."""

    def __init__(self, model: LoadedModel, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, cut_batches(batches, TOKENS)
        self._replay = BlockReplay(model, self._batches)
        self._hidden = [self._replay.embed(i) for i in range(len(self._batches))]
        few = len(cut_batches(self._batches, ERROR_TOKENS))
        self._judged = BlockReplay(model, cut_batches(self._batches, ERROR_TOKENS))
        rows = [len(batch["input_ids"]) for batch in cut_batches(self._batches, ERROR_TOKENS)]
        self._judged_rows = rows[:few]

    def view(
        self, block: int, layers: Sequence[LayerSpec], labels: Mapping[str, str], share: float
    ) -> BlockView:
        """Return what a method sees of the next block."""
        inputs = self._sample(block, list(labels))
        before = [h[:rows] for h, rows in zip(self._hidden, self._judged_rows, strict=False)]
        dense = [self._judged.run(block, h.clone(), i) for i, h in enumerate(before)]

        def measure_error(rules: Rules) -> float:
            total, count = 0.0, 0
            with apply_rules(self._model, rules):
                for i, h in enumerate(before):
                    gap = (self._judged.run(block, h.clone(), i) - dense[i]).float().norm(dim=-1)
                    real = mask_real_tokens(self._judged.batches[i])
                    total += float(gap[real].double().sum())
                    count += int(real.sum())
            return total / max(1, count)

        def read_weight(name: str) -> Tensor:
            return get_weight(self._model.linear(name)).float()

        def multiply(name: str, x_TI: Tensor) -> Tensor:
            module = self._model.linear(name)
            y_TO: Tensor = module(x_TI.to(self._model.dtype))
            return y_TO.float()

        return BlockView(
            layers=layers,
            labels=labels,
            inputs=inputs,
            share=share,
            get_weight=read_weight,
            multiply=multiply,
            measure_error=measure_error,
        )

    def _sample(self, block: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Run the block without rules; return the inputs of its linears, without padding."""
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        masks = [mask_real_tokens(batch).flatten() for batch in self._batches]
        running = 0

        def make_hook(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                x_TI = args[0].detach().reshape(-1, args[0].shape[-1])
                mask_T = masks[running]
                parts[name].append((x_TI[mask_T] if len(mask_T) == len(x_TI) else x_TI).float())

            return hook

        with ExitStack() as stack:
            for name in names:
                hook = make_hook(name)
                stack.callback(self._model.linear(name).register_forward_pre_hook(hook).remove)
            for index, hidden in enumerate(self._hidden):
                running = index
                self._replay.run(block, hidden.clone(), index)
        return {name: torch.cat(rows) for name, rows in parts.items()}

    def advance(self, block: int, rules: Rules) -> dict[str, DroppedInputs]:
        """Run the block with its rules; return what each dropped."""
        counts: dict[str, DroppedInputs] = {}
        with apply_rules(self._model, rules, counts):
            for index, hidden in enumerate(self._hidden):
                self._hidden[index] = self._replay.run(block, hidden, index)
        return counts


def cut_batches(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Return the first batches that hold about `tokens` together, the last cut to whole rows."""
    chosen: list[Batch] = []
    left = tokens
    for batch in batches:
        if left <= 0:
            break
        rows, length = batch["input_ids"].shape
        take = min(rows, max(1, -(-left // length)))
        chosen.append({name: value[:take] for name, value in batch.items()})
        left -= take * length
    return chosen
