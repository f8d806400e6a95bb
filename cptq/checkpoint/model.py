"""A model before and after its weights are loaded, with all that later stages read from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from cptq.checkpoint.memory import Memory
from cptq.checkpoint.resident import ResidentWeights, find_weight
from cptq.checkpoint.spill import Spill
from cptq.types import LayerSpec, ModelKind, TensorSpec, Unit

#: families that count positions from padding_idx + 1
POSITIONS_FROM_PADDING = (
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "xmod"),
    *("mpnet", "data2vec-text", "ibert", "longformer", "luke"),
)


@dataclass(kw_only=True, eq=False)
class ModelSpec:
    """A model without its weights: its directory, config and tokenizer.

    Enough to prepare what the model will be run on (`cptq.checkpoint.loader.read_spec`).
    """

    source: str
    path: Path
    tokenizer: PreTrainedTokenizerBase | None
    config: PretrainedConfig
    kind: ModelKind
    family: str

    @property
    def max_positions(self) -> int | None:
        """Longest input the positions allow; None if the config does not say, or says -1."""
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            value = getattr(self.config.get_text_config(), name, None)
            if isinstance(value, int) and value > 0:
                offset = 2 if self.config.model_type in POSITIONS_FROM_PADDING else 0
                return value - offset
        return None


@dataclass(kw_only=True, eq=False)
class LoadedModel(ModelSpec):
    """A model in evaluation mode on one device, with its inventory.

    `tensors` is what a dense artifact holds: tied duplicates dropped, types as in the checkpoint.
    `layers` are all weight matrices in forward order, `units` the compressible decisions in the
    blocks, `vocabulary` those outside: the token embedding and the output head. `resident` keeps
    the matrices of a dense model in memory while they are used, `spill` activations that wait;
    `memory` is what both may take.
    """

    module: nn.Module
    block_names: tuple[str, ...]
    layers: tuple[LayerSpec, ...]
    units: tuple[Unit, ...]
    vocabulary: tuple[Unit, ...]
    tensors: tuple[TensorSpec, ...]
    fingerprint: str
    quantized: bool
    device: torch.device
    dtype: torch.dtype
    resident: ResidentWeights | None = None
    spill: Spill = field(default_factory=Spill)
    memory: Memory | None = None

    def fetch(self, name: str) -> Tensor | None:
        """Return a tensor of `tensors` by its name; None if the model has none of that name.

        It may be in the checkpoint's type or in that of the model.
        """
        place, _, end = name.rpartition(".")
        try:
            module = self.module.get_submodule(place)
        except AttributeError:
            return None
        known = find_weight(module, end)
        value = getattr(module, end, None) if known is None else known.read()
        return value.detach() if isinstance(value, Tensor) else None

    def restore_dense(self) -> None:
        """Have the weights of the checkpoint again, whatever was set.

        Raises:
            RuntimeError: the model was compressed when it was loaded.
        """
        if self.resident is None:
            raise RuntimeError("only the weights of a dense model can be restored")
        self.resident.restore()

    def give_back_memory(self) -> None:
        """Give back what a stage has left, where memory does not hold the model as a whole."""
        if self.resident is not None:
            self.resident.give_back()

    @contextmanager
    def hold(self, block: int) -> Iterator[None]:
        """Have the weights of a block in memory inside, in tensors that stay the same."""
        part = self.blocks[block]
        with nullcontext() if self.resident is None else self.resident.hold(part):
            yield

    def linear(self, name: str) -> nn.Module:
        """The module called `name`."""
        return self.module.get_submodule(name)

    @property
    def held_whole(self) -> bool:
        """Whether all weights are in memory, rather than one block at a time."""
        return self.resident is None or self.resident.limit is None

    @property
    def hidden_size(self) -> int:
        """The width of a hidden state: that of the config, or what the first linear reads."""
        width = getattr(self.config.get_text_config(), "hidden_size", None)
        return width if isinstance(width, int) else self.units[0].layers[0].shape[1]

    @property
    def all_units(self) -> tuple[Unit, ...]:
        """Everything that a plan may decide on."""
        return (*self.units, *self.vocabulary)

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The blocks, in forward order."""
        return [self.linear(name) for name in self.block_names]

    @property
    def parameters(self) -> int:
        """Number of stored weights, tied ones once."""
        return sum(spec.numel for spec in self.tensors)
