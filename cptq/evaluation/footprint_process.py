"""Load time, memory and speed of a checkpoint, measured in a process of its own.

    python -m cptq.evaluation.footprint_process PATH --kind causal-lm [--device cpu] ...

prints one line of JSON. The checkpoint is loaded as `cptq.load` does, in a process that has loaded
nothing else: a peak of memory cannot be reset, and what the caller holds would count.

- `load_seconds`: reading the weights and the move to the device. The file may be in the system's
  cache or not; it is not cleared.
- `first_output_seconds`: that and the first forward, in which a checkpoint that only stock
  transformers computes unpacks itself.
- `peak_bytes`: the most memory the process had resident at once; `import_bytes` of it were there
  before the model was loaded (Python, torch, the model's code). Pages of a mapped file count.
- causal LMs: tokens per second of reading a prompt (prefill) and of greedy decoding with a cache
  of keys and values, one token at a time, for one sequence. Others: tokens and rows per second of
  a forward of `batch_size` rows. The median of a few repeats after a warm-up; its standard error,
  under `NAME_stderr`, is that of a median of normal times, sqrt(pi / 2) * s / sqrt(n), carried over
  to the rate (delta method). It covers what differs from repeat to repeat, not from day to day.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
import transformers

from cptq.checkpoint.loader import open_module
from cptq.evaluation.fresh_process import read_resident_bytes

PROMPT, NEW = 64, 32
REPEATS, BUDGET_SECONDS = 5, 6.0
AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "classifier": "AutoModelForSequenceClassification",
    "encoder": "AutoModel",
}


def measure_checkpoint(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure all numbers, by name."""
    torch.manual_seed(arguments.seed)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    auto, device = getattr(transformers, AUTO_CLASSES[arguments.kind]), arguments.device
    import_model_code(auto, arguments)
    before, begin = read_resident_bytes("VmRSS"), time.perf_counter()
    model = open_module(
        arguments.path,
        arguments.kind,
        device=device,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    loaded = time.perf_counter()
    ids = make_prompt(model, 1 if arguments.kind == "causal-lm" else arguments.batch_size, device)
    with torch.inference_mode():
        model(input_ids=ids)
        first = read_clock(device)
        time_model = time_decoding if arguments.kind == "causal-lm" else time_forward
        speed = time_model(model, ids)
    return {
        "load_seconds": loaded - begin,
        "first_output_seconds": first - begin,
        "import_bytes": before,
        # the kernel counts its peak per thread and adds up late, so that it may lag a little behind
        "peak_bytes": max(before, read_resident_bytes("VmHWM")),
        **_read_device_peak(device),
        **speed,
    }


def import_model_code(auto: Any, arguments: argparse.Namespace) -> None:
    """Import what loading needs, so that its memory does not count for the first model.

    Building the model without memory for its weights imports its code.
    """
    trust = arguments.trust_remote_code
    config = transformers.AutoConfig.from_pretrained(arguments.path, trust_remote_code=trust)
    wanted = ["accelerate", "safetensors.torch"]
    if getattr(config, "quantization_config", None):
        wanted.append("compressed_tensors")
    for name in wanted:
        import_module(name)
    with torch.device("meta"):
        auto.from_config(config, trust_remote_code=trust)


def make_prompt(model: Any, rows: int, device: str) -> torch.Tensor:
    """Make (rows, tokens) random token ids, short enough for the model."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or PROMPT + NEW
    length = max(1, min(PROMPT, most - NEW, most // 2))
    return torch.randint(int(config.vocab_size), (rows, length)).to(device)


def time_decoding(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Time reading the prompt and writing NEW tokens after it, in tokens per second."""
    device = str(ids.device)
    reading, writing = [], []

    def once() -> None:
        start = read_clock(device)
        out = model(input_ids=ids, use_cache=True)
        read = read_clock(device)
        for _ in range(NEW):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        reading.append(read - start)
        writing.append(read_clock(device) - read)

    repeat(once)
    return {
        **compute_rate("prefill_tokens_per_second", ids.numel(), reading[1:] or reading),
        **compute_rate("decode_tokens_per_second", NEW, writing[1:] or writing),
        "repeats": float(len(reading[1:] or reading)),
    }


def time_forward(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Time one forward, in tokens and rows per second."""
    device = str(ids.device)
    times: list[float] = []

    def once() -> None:
        start = read_clock(device)
        model(input_ids=ids)
        times.append(read_clock(device) - start)

    repeat(once)
    kept = times[1:] or times
    return {
        **compute_rate("tokens_per_second", ids.numel(), kept),
        **compute_rate("rows_per_second", ids.shape[0], kept),
        "repeats": float(len(kept)),
    }


def compute_rate(name: str, count: int, seconds: Sequence[float]) -> dict[str, float]:
    """Compute `count` per median second and, of two repeats or more, its standard error."""
    middle = statistics.median(seconds)
    found = {name: count / middle}
    if len(seconds) > 1:
        error = math.sqrt(math.pi / 2 / len(seconds)) * statistics.stdev(seconds)
        found[f"{name}_stderr"] = count / middle * error / middle
    return found


def repeat(once: Callable[[], None]) -> None:
    """Run a warm-up and REPEATS times, or fewer if they take longer than BUDGET_SECONDS."""
    begin = time.perf_counter()
    for _ in range(1 + REPEATS):
        once()
        if time.perf_counter() - begin > BUDGET_SECONDS:
            break


def read_clock(device: str) -> float:
    """Read the clock once the device has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def _read_device_peak(device: str) -> dict[str, float]:
    if not device.startswith("cuda"):
        return {}
    return {"peak_device_bytes": float(torch.cuda.max_memory_allocated())}


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cptq.evaluation.footprint_process")
    parser.add_argument("path")
    parser.add_argument("--kind", required=True, choices=AUTO_CLASSES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--trust-remote-code", action="store_true")
    return parser


if __name__ == "__main__":
    # the only place outside the command line that prints: the parent process reads it
    sys.stdout.write("\n" + json.dumps(measure_checkpoint(_build_parser().parse_args())) + "\n")
