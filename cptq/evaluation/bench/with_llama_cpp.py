"""Run a GGUF file with llama.cpp through llama-cpp-python's low-level functions, on the CPU.

Its defaults are kept (keys and values in float16, flash attention as it decides), but for the
number of threads and a context that holds all sequences. The context is made at the first run, as
transformers makes its cache then. The most likely tokens are found with NumPy.
"""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

import numpy as np

from cptq.errors import EvaluationError
from cptq.evaluation.bench.process import Rows

#: llama.cpp rounds the context of a sequence up to such blocks
_BLOCK = 256


class LlamaCppEngine:
    """See `cptq.evaluation.bench.process.Engine`.

    Args:
        path: the GGUF file, of a causal language model.
        threads: for prompts and for single tokens alike.
        most_rows: the largest batch that will be run.
        most_tokens: prompt and new tokens of one sequence.
    """

    def __init__(self, *, path: str, threads: int, most_rows: int, most_tokens: int) -> None:
        self.lib: Any = import_module("llama_cpp")
        self.lib.llama_backend_init()
        self.path, self.threads = path, threads
        self.most_rows, self.most_tokens = most_rows, most_tokens
        self.model: Any = None
        self.context: Any = None
        self.batch: Any = None

    def load(self) -> None:
        """Load the model.

        Raises:
            EvaluationError: llama.cpp refuses the file.
        """
        parameters = self.lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(self.path.encode(), parameters)
        if not self.model:
            raise EvaluationError(f"llama.cpp cannot load {self.path}")

    def run(self, rows: Rows, new_tokens: int) -> dict[str, Any]:
        """Generate exactly `new_tokens` tokens greedily after each row."""
        length = len(rows[0])
        begin = time.perf_counter()
        if self.context is None:
            self._make_context()
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        tokens = self._step(rows, start=0)
        first = time.perf_counter()
        for step in range(new_tokens - 1):
            tokens = self._step([[token] for token in tokens], start=length + step)
        seconds = time.perf_counter() - first
        return {"first_seconds": first - begin, "later_seconds": seconds, "way": "llama.cpp"}

    def _make_context(self) -> None:
        parameters = self.lib.llama_context_default_params()
        per_row = -(-self.most_tokens // _BLOCK) * _BLOCK
        parameters.n_ctx = self.most_rows * per_row
        parameters.n_batch = self.most_rows * self.most_tokens
        parameters.n_seq_max = self.most_rows
        parameters.n_threads = parameters.n_threads_batch = self.threads
        self.context = self.lib.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise EvaluationError(f"llama.cpp cannot create a context for {self.path}")
        self.batch = self.lib.llama_batch_init(parameters.n_batch, 0, 1)

    def _step(self, rows: Rows, start: int) -> list[int]:
        """Compute rows that begin at position `start`; return the most likely token after each."""
        batch, at, ends = self.batch, 0, []
        for row, ids in enumerate(rows):
            for offset, token in enumerate(ids):
                batch.token[at], batch.pos[at] = token, start + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                batch.logits[at] = offset == len(ids) - 1
                at += 1
            ends.append(at - 1)
        batch.n_tokens = at
        if self.lib.llama_decode(self.context, batch):
            raise EvaluationError(f"llama.cpp cannot compute {at} tokens of {self.path}")
        width = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        found = (self.lib.llama_get_logits_ith(self.context, end) for end in ends)
        return [int(np.ctypeslib.as_array(logits, (width,)).argmax()) for logits in found]

    def read_device_bytes(self) -> dict[str, float]:
        """Nothing is on a GPU."""
        return {}
