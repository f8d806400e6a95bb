"""Load a GGUF file with llama.cpp in a fresh process and report. Run as a script.

`python -P llama_load.py JOB.json`: the job gives the file, token ids, texts to tokenize, and the
paths of the results. The script must not import cptq. Keys and values of attention stay in float32,
so that outputs differ from transformers only by llama.cpp's arithmetic on weights. Not part of the
package's interface.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any


def main(job_file: str) -> None:
    """Run the job; write the outputs per token (.npy) and a report."""
    with open(job_file, encoding="utf-8") as stream:
        job = json.load(stream)

    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(job["file"].encode(), parameters)
    if not model:
        sys.exit("llama.cpp cannot load the file")
    rows = [_run(llama_cpp, np, model, ids, job) for ids in job["rows"]]
    np.save(job["answer"], np.concatenate(rows))
    tokens = [_tokenize(llama_cpp, model, text) for text in job["texts"]]
    found = sorted(name for name in sys.modules if name.split(".")[0] == "cptq")
    with open(job["report"], "w", encoding="utf-8") as stream:
        json.dump({"tokens": tokens, "cptq": found}, stream)


def _run(lib: Any, np: Any, model: Any, ids: list[int], job: dict[str, Any]) -> Any:
    """Return the outputs of one row: (tokens, width) logits or encoder states, or (1, labels)."""
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max(32, len(ids))
    parameters.n_threads = parameters.n_threads_batch = job["threads"]
    parameters.type_k = parameters.type_v = lib.GGML_TYPE_F32
    parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    classifies = job["kind"] == "classifier"
    parameters.embeddings = job["kind"] != "causal-lm"
    parameters.pooling_type = (
        lib.LLAMA_POOLING_TYPE_RANK if classifies else lib.LLAMA_POOLING_TYPE_NONE
    )
    context = lib.llama_init_from_model(model, parameters)
    if not context:
        sys.exit("llama.cpp cannot create a context")
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    if lib.llama_decode(context, batch):
        sys.exit("llama.cpp cannot compute the sample")
    values = np.ctypeslib.as_array(
        *_locate_answer(lib, model, context, len(ids), job["kind"])
    ).copy()
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    return values


def _locate_answer(lib: Any, model: Any, context: Any, tokens: int, kind: str) -> tuple[Any, Any]:
    """Return a pointer to the outputs, and their shape."""
    if kind == "classifier":
        return lib.llama_get_embeddings_seq(context, 0), (1, lib.llama_model_n_cls_out(model))
    if kind == "encoder":
        return lib.llama_get_embeddings(context), (tokens, lib.llama_model_n_embd(model))
    width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    return lib.llama_get_logits(context), (tokens, width)


def _tokenize(lib: Any, model: Any, text: str) -> list[int]:
    raw, most = text.encode(), len(text.encode()) + 8
    tokens = (ctypes.c_int32 * most)()
    vocabulary = lib.llama_model_get_vocab(model)
    count = lib.llama_tokenize(vocabulary, raw, len(raw), tokens, most, True, True)
    return list(tokens[: max(0, count)])


if __name__ == "__main__":
    main(sys.argv[1])
