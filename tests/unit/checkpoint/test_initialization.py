"""Linears whose weights a family's `_init_weights` reads by name are found, and no others."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from cptq.checkpoint.initialization import list_initialized_linears


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(5, 3), nn.Linear(5, 3)


class Model(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.first, self.second, self.plain = Gated(), Gated(), nn.Linear(5, 5)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # skips a linear that has no weight
        if isinstance(module, Gated):
            nn.init.zeros_(module.gate.weight)
            nn.init.zeros_(module.gate.weight)


def test_linears_that_are_read_by_name_are_found_and_keep_their_values() -> None:
    model = Model(PretrainedConfig())
    nn.init.ones_(model.first.gate.weight)
    assert list_initialized_linears(model) == {"first.gate", "second.gate"}
    assert torch.equal(model.first.gate.weight, torch.ones(3, 5))
    assert isinstance(model.first.gate, nn.Linear)
