"""Run a checkpoint or an artifact with transformers, as its users do.

It is loaded as by `cptq.load`. A causal language model decodes through
`cptq.inference.generation`; other kinds compute a forward pass of the prompt.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
import transformers

from cptq.checkpoint.loader import open_module
from cptq.evaluation.bench.process import Rows
from cptq.evaluation.footprint_process import AUTO_CLASSES, import_model_code, read_clock
from cptq.inference.generation import decode
from cptq.types import ModelKind


class TransformersEngine:
    """See `cptq.evaluation.bench.process.Engine`.

    Args:
        path: directory of the model.
        kind: one of AUTO_CLASSES.
        device: such as "cpu" or "cuda:0".
        dtype: type to compute in, such as "float32".
        threads: of torch.
        trust_remote_code: let the model's own code run.
    """

    def __init__(
        self,
        *,
        path: str,
        kind: ModelKind,
        device: str,
        dtype: str,
        threads: int,
        trust_remote_code: bool,
    ) -> None:
        torch.set_num_threads(threads)
        self.path, self.kind, self.device = path, kind, device
        self.dtype, self.trust_remote_code = dtype, trust_remote_code
        self.model: Any = None
        auto = getattr(transformers, AUTO_CLASSES[kind])
        import_model_code(auto, Namespace(path=path, trust_remote_code=trust_remote_code))

    def load(self) -> None:
        """Load the model and move it to its device."""
        self.model = open_module(
            self.path,
            self.kind,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
        )
        read_clock(self.device)

    def run(self, rows: Rows, new_tokens: int) -> dict[str, Any]:
        """Generate exactly `new_tokens` tokens greedily, or compute one forward pass."""
        return run_rows(self.model, self.kind, rows, new_tokens)

    def read_device_bytes(self) -> dict[str, float]:
        """Read the memory of torch's tensors on a CUDA device."""
        if not self.device.startswith("cuda"):
            return {}
        return {
            "loaded_device_bytes": float(torch.cuda.memory_allocated()),
            "peak_device_bytes": float(torch.cuda.max_memory_allocated()),
        }


def run_rows(model: Any, kind: ModelKind, rows: Rows, new_tokens: int) -> dict[str, Any]:
    """Do what `Engine.run` does, with a model on its device."""
    device = str(model.device)
    ids_BT = torch.tensor(rows, device=device)
    if kind == "causal-lm":
        found = decode(model, ids_BT, new_tokens=new_tokens)
        return {
            "first_seconds": found.first_seconds,
            "later_seconds": found.later_seconds,
            "way": found.way,
        }
    with torch.inference_mode():
        begin = read_clock(device)
        model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
        return {"first_seconds": read_clock(device) - begin, "way": "forward pass"}
