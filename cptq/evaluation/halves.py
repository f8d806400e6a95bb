"""A causal language model as two halves: ids -> hidden states, hidden states -> logits.

Logits are the largest thing in evaluation (2,048 positions of a vocabulary of 49,152 are 400 MB),
and mostly not needed at once or at all: perplexity makes them a few hundred positions at a time, a
scored answer only at its own tokens, and a comparison with another model can keep the other's
hidden states, which are a hundred times smaller, and its head.

A model whose logits are not the head of its body (it caps or scales them) is one half: its hidden
states are the logits, and the head leaves them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: logits in memory at one time (128 MiB of float32)
LOGIT_ELEMENTS = 2**25
_CHECKED_POSITIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Halves:
    """`body` None: the model cannot be divided, and `head` is the identity."""

    module: nn.Module
    body: nn.Module | None
    head: nn.Module

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """(batch, tokens, width): the last hidden states, or the logits of an undivided model."""
        if self.body is None:
            rows = (self.module(input_ids=row, use_cache=False).logits for row in ids_BT.split(1))
            return torch.cat(list(rows))
        states: Tensor = self.body(input_ids=ids_BT, use_cache=False).last_hidden_state
        return states


def halves(module: nn.Module, ids_BT: Tensor) -> Halves:
    """The model divided; `ids_BT` are used to check that body and head give its own logits.

    The whole model is called first, so that a packed checkpoint unpacks itself.
    """
    body, head = getattr(module, "base_model", None), _head(module)
    if isinstance(body, nn.Module) and body is not module and head is not None:
        ids = ids_BT[:1, :_CHECKED_POSITIONS]
        whole = module(input_ids=ids, use_cache=False).logits
        pieces = head(body(input_ids=ids, use_cache=False).last_hidden_state)
        if whole.shape == pieces.shape and torch.allclose(whole, pieces, rtol=1e-4, atol=1e-4):
            return Halves(module=module, body=body, head=head)
    return Halves(module=module, body=None, head=nn.Identity())


def _head(module: nn.Module) -> nn.Module | None:
    find = getattr(module, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head if isinstance(head, nn.Module) else None


def positions_at_once(head: nn.Module, hidden_BTC: Tensor, elements: int) -> int:
    """How many positions of all rows have `elements` logits in all (at least one)."""
    known = getattr(head, "out_features", None)
    vocabulary = int(known) if known else int(head(hidden_BTC[:1, :1]).shape[-1])
    return max(1, elements // (vocabulary * hidden_BTC.shape[0]))
