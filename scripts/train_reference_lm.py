#!/usr/bin/env python3
"""What `scripts/train_reference_lm` runs: a trained member of a family, from text alone.

Compression is only honest on trained weights, and each family brings what others lack: OPT a ReLU,
learned positions and biases, GPT-2 its transposed Conv1D, Llama gates, rotary positions and shared
keys and values. What minutes on a CPU teach a million weights hardly suffers from 4 bits: it takes
the divergence from the dense model to rank plans (docs/evaluation.md has the figures).

- Text: the last HELD_OUT of every file is never trained on, nor seen by the tokenizer. It is
  written beside the model as heldout.txt, the rest as training.txt, so that `cptq compress
  --calibration OUT/training.txt` and `cptq eval --task text:OUT/heldout.txt` share nothing.
- Tokenizer: byte-level BPE as GPT-2's, trained on the training part; no special tokens are added.
- Training: windows drawn at random, AdamW (0.9, 0.95), a short warm-up and a cosine down to a
  tenth. With --minutes the schedule follows the clock, so that two runs differ; --steps repeats.
- Weights are saved in float16, as OPT's are, and what is stated was measured on those.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _reference_models import (
    SIZES,
    Size,
    config,
    encode,
    read_files,
    train_tokenizer,
)
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import logging as transformers_logging

from cptq.errors import CptqError
from cptq.evaluation.perplexity import cut_windows, estimate_ratio, exponentiate, measure_nll

LOG_EVERY = 50
WARM_UP, FLOOR = 0.03, 0.1


def clock(minutes: float | None, steps: int | None) -> Callable[[int], float]:
    """A function step -> share of the training that is done."""
    begin = time.perf_counter()
    if steps is not None:
        return lambda step: step / steps
    return lambda step: (time.perf_counter() - begin) / (60 * (minutes or 1))


def rate(share: float) -> float:
    """The learning rate's factor: up in a straight line, then down a cosine."""
    if share < WARM_UP:
        return max(share / WARM_UP, 0.01)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP))) / 2


def batches(ids: Tensor, size: Size, seed: int) -> Iterator[Tensor]:
    """(batch, context) windows from anywhere in the text, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - size.context, (size.batch,), generator=generator)
        yield torch.stack([ids[start : start + size.context] for start in starts.tolist()])


def train(
    model: Any, ids: Tensor, size: Size, done: Callable[[int], float], seed: int
) -> list[dict[str, float]]:
    """Train in place; the mean loss (nats per token) of every LOG_EVERY steps."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=size.rate, betas=(0.9, 0.95))
    device, curve, recent, step = next(model.parameters()).device, [], [], 0
    model.train()
    for batch in batches(ids, size, seed):
        share = done(step)
        if share >= 1 and step:
            break
        for group in optimizer.param_groups:
            group["lr"] = size.rate * rate(min(share, 1.0))
        recent.append(_step(model, batch.to(device), optimizer))
        step += 1
        if step % LOG_EVERY == 0:
            curve.append(_told(step, recent, share))
            recent = []
    if recent:
        curve.append(_told(step, recent, 1.0))
    return curve


def _step(model: Any, ids_BT: Tensor, optimizer: torch.optim.Optimizer) -> float:
    with torch.autocast("cuda", torch.bfloat16, enabled=ids_BT.is_cuda):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def _told(step: int, losses: Sequence[float], share: float) -> dict[str, float]:
    loss = sum(losses) / len(losses)
    print(f"step {step}: loss {loss:.3f} ({100 * min(share, 1.0):.0f}%)", file=sys.stderr)
    return {"step": step, "loss": round(loss, 4)}


def held_out_perplexity(model: Any, ids: Tensor, size: Size) -> dict[str, float]:
    """What `cptq eval --task text:OUT/heldout.txt` finds on a CPU."""
    windows_NT = cut_windows(ids, size.context)
    device = next(model.parameters()).device
    nll_N = measure_nll(model.eval(), windows_NT, batch_size=16, device=device).numpy()
    found = exponentiate(estimate_ratio(nll_N, torch.full((len(nll_N),), size.context - 1).numpy()))
    stderr = None if found.stderr is None else round(found.stderr, 4)
    return {
        "perplexity": round(found.value, 4),
        "stderr": stderr,
        "tokens": len(nll_N) * (size.context - 1),
        "seqlen": size.context,
    }


def make(given: argparse.Namespace, paths: Sequence[Path], place: Path) -> dict[str, Any]:
    """Train and write everything into `place`; the record that is written there too."""
    size, begin = SIZES[given.size], time.perf_counter()
    training, held, records = read_files(paths, size.context)
    tokenizer = train_tokenizer(training, size)
    ids, held_ids = encode(tokenizer, training), encode(tokenizer, held)
    torch.manual_seed(given.seed)
    model = AutoModelForCausalLM.from_config(config(given.arch, size)).to(given.device)
    curve = train(model, ids, size, clock(given.minutes, given.steps), given.seed)
    model.half().save_pretrained(place)
    tokenizer.save_pretrained(place)
    (place / "training.txt").write_text(training, encoding="utf-8")
    (place / "heldout.txt").write_text(held, encoding="utf-8")
    steps = int(curve[-1]["step"])
    record = {
        "arch": given.arch,
        "size": {"name": given.size, **asdict(size)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": records,
        "training_tokens_available": len(ids),
        "steps": steps,
        "tokens_seen": steps * size.batch * size.context,
        "loss": curve,
        "held_out": held_out_perplexity(model.float(), held_ids, size),
        "seed": given.seed,
        "device": given.device,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    (place / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def texts_of(given: argparse.Namespace) -> list[Path]:
    """The files named, else those of CPTQ_ASSETS.

    Raises:
        CptqError: there are none.
    """
    if given.text:
        return [given.caller / path for path in given.text]
    assets = os.environ.get("CPTQ_ASSETS")
    found = sorted((Path(assets) / "data" / "text").glob("*.txt")) if assets else []
    if not found:
        raise CptqError("there is no text to train on", hint="--text FILE, or set CPTQ_ASSETS")
    return found


def run(given: argparse.Namespace) -> None:
    """Make the model beside its place, then rename it into it."""
    out = (given.caller / given.out).resolve()
    if out.exists():
        raise CptqError(f"{out} is already there", hint="name another place, or remove it")
    paths = texts_of(given)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        place = Path(work) / out.name
        place.mkdir()
        record = make(given, paths, place)
        place.rename(out)
    held = record["held_out"]
    print(
        f"{out}: {record['parameters']:,} parameters, {record['steps']:,} steps, "
        f"{record['tokens_seen']:,} tokens, loss {record['loss'][-1]['loss']}, "
        f"held-out perplexity {held['perplexity']} on {held['tokens']:,} tokens, "
        f"{record['seconds']:.0f} s"
    )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/train_reference_lm", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", required=True, choices=("opt", "gpt2", "llama"))
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=None, help="default 4")
    budget.add_argument("--steps", type=int, default=None)
    parser.add_argument("--text", type=Path, action="append")
    parser.add_argument("--size", choices=tuple(SIZES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", dest="caller", type=Path, default=Path(), help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.steps is None and given.minutes is None:
        given.minutes = 4.0
    if (given.steps or given.minutes) <= 0:
        parser.error("--minutes and --steps are above 0")
    given.size = given.size or ("large" if given.device.startswith("cuda") else "small")
    return given


def main() -> None:
    given = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is half made goes away
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        run(given)
    except CptqError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
