"""Load a directory with stock transformers in a fresh process and report. Run as a script.

`python -P stock_load.py JOB.json`: the job gives the directory, the auto class, a safetensors file
of inputs, and the paths of the results. The script must not import cptq, to prove that loading does
not need it, except where the job lists modules that the format requires. Not part of the package's
interface.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any


def main(job_file: str) -> None:
    """Run the job; write {missing, unexpected, mismatched, cptq, weight_bytes} and the output."""
    with open(job_file, encoding="utf-8") as stream:
        job = json.load(stream)

    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    for module in job["imports"]:
        import_module(module)
    torch.set_num_threads(job["threads"])
    options: dict[str, Any] = {"attn_implementation": job["attention"]} if job["attention"] else {}
    if job["blocks"] is not None:
        options["config"] = shorten(
            transformers.AutoConfig.from_pretrained(
                job["directory"], trust_remote_code=job["trust_remote_code"]
            ),
            job["blocks"],
        )
    model, info = getattr(transformers, job["auto_class"]).from_pretrained(
        job["directory"],
        output_loading_info=True,
        dtype=torch.float32,
        trust_remote_code=job["trust_remote_code"],
        **options,
    )
    for parameter in model.parameters():  # stacked experts keep the type of their scales
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    with torch.no_grad():
        output = model.eval()(**load_file(job["inputs"]))
    logits = getattr(output, "logits", None)
    answer = output.last_hidden_state if logits is None else logits
    save_file({"answer": answer.float().contiguous()}, job["answer"])
    with open(job["report"], "w", encoding="utf-8") as stream:
        report = _report(info, tuple(job["left_out"]))
        json.dump(report | {"weight_bytes": _count_bytes(model)}, stream)


def _count_bytes(model: Any) -> int:
    """Return the bytes of the parameters and buffers, each tensor once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors if t.nbytes}.values())


def shorten(config: Any, blocks: int) -> Any:
    """Return the config of a model of the first blocks alone."""
    before = config.num_hidden_layers
    for name, value in list(vars(config).items()):  # what is said block by block
        if isinstance(value, list) and len(value) == before:
            setattr(config, name, value[:blocks])
    config.num_hidden_layers = blocks
    return config


def _report(info: dict[str, Any], left_out: tuple[str, ...]) -> dict[str, Any]:
    keys = ("missing", "unexpected", "mismatched")
    report: dict[str, Any] = {key: sorted(map(str, info[f"{key}_keys"])) for key in keys}
    report["unexpected"] = [x for x in report["unexpected"] if not x.startswith(left_out)]
    report["cptq"] = sorted(name for name in sys.modules if name.split(".")[0] == "cptq")
    return report


if __name__ == "__main__":
    main(sys.argv[1])
