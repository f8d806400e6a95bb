"""A causal language model split in two: ids -> hidden states, hidden states -> logits.

Logits are the largest tensor of an evaluation (2,048 positions of a vocabulary of 49,152 are 400
MB), and mostly not needed at once or at all: perplexity makes them a few hundred positions at a
time, a scored answer only at its own tokens, and a comparison with another model can keep the
other's hidden states, which are a hundred times smaller, and its head.

A model whose logits are not the head of its body (it caps or scales them) is not split: its hidden
states are the logits, and the head is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from cptq.numerics.logits import compute_logsumexp

#: logits in memory at one time (128 MiB of float32)
LOGIT_ELEMENTS = 2**25
_CHECKED_POSITIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitModel:
    """`body` None: the model cannot be split, and `head` is the identity."""

    module: nn.Module
    body: nn.Module | None
    head: nn.Module

    def compute_hidden(self, ids_BT: Tensor) -> Tensor:
        """(batch, tokens, width): the last hidden states, or the logits of a model not split."""
        if self.body is None:
            rows = (self.module(input_ids=row, use_cache=False).logits for row in ids_BT.split(1))
            return torch.cat(list(rows))
        states: Tensor = self.body(input_ids=ids_BT, use_cache=False).last_hidden_state
        return states


def split_model(module: nn.Module, ids_BT: Tensor) -> SplitModel:
    """Split the model; `ids_BT` are used to check that body and head give the model's own logits.

    The whole model is called first, so that a packed checkpoint unpacks itself.
    """
    body, head = getattr(module, "base_model", None), _find_head(module)
    if isinstance(body, nn.Module) and body is not module and head is not None:
        ids = ids_BT[:1, :_CHECKED_POSITIONS]
        whole = module(input_ids=ids, use_cache=False).logits
        pieces = head(body(input_ids=ids, use_cache=False).last_hidden_state)
        if whole.shape == pieces.shape and torch.allclose(whole, pieces, rtol=1e-4, atol=1e-4):
            return SplitModel(module=module, body=body, head=head)
    return SplitModel(module=module, body=None, head=nn.Identity())


def _find_head(module: nn.Module) -> nn.Module | None:
    find = getattr(module, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head if isinstance(head, nn.Module) else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Some predictions of some windows; their logits are made when they are first asked for.

    `rows` and `positions` are their places among all windows, and in each. `hidden_BTC` is in the
    model's type, `labels_BT` int64.
    """

    head: nn.Module
    rows: slice
    positions: slice
    hidden_BTC: Tensor
    labels_BT: Tensor

    @cached_property
    def logits_BTV(self) -> Tensor:
        """Logits (batch, positions, vocabulary), float32."""
        logits_BTV: Tensor = self.head(self.hidden_BTC).float()
        return logits_BTV

    @cached_property
    def lse_BT(self) -> Tensor:
        """Their normalisers (batch, positions), float64 (`numerics.logits`)."""
        return compute_logsumexp(self.logits_BTV.flatten(0, 1)).view(self.labels_BT.shape)

    def compute_nll(self) -> Tensor:
        """Return the negative log-likelihood of each label in nats (batch, positions), float64."""
        chosen_BT = self.logits_BTV.gather(-1, self.labels_BT.unsqueeze(-1)).squeeze(-1)
        return self.lse_BT - chosen_BT


def count_positions(head: nn.Module, hidden_BTC: Tensor, elements: int) -> int:
    """Count the positions of all rows that have `elements` logits in all (at least one)."""
    known = getattr(head, "out_features", None)
    vocabulary = int(known) if known else int(head(hidden_BTC[:1, :1]).shape[-1])
    return max(1, elements // (vocabulary * hidden_BTC.shape[0]))
