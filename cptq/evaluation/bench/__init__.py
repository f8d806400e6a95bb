"""Processes that run one model each and take turns, for `cptq bench`.

`process` is the loop in such a process; it drives an `Engine`: `with_transformers` for checkpoints
and artifacts, `with_llama_cpp` for GGUF files. `cptq.evaluation.fresh_process.Worker` starts it.
"""
