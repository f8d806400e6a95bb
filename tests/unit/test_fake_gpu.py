"""The GPU of the tests answers and refuses as a real one does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("gpu")
GPU = torch.device("cuda", 0)


def on_gpu(*shape: int) -> Tensor:
    return torch.ones(shape, device="cuda")


def test_factories_and_moves_say_where_a_tensor_lies() -> None:
    x, y = on_gpu(3), torch.ones(3)
    assert x.device == GPU
    assert x.is_cuda
    assert not x.is_cpu
    assert y.device.type == "cpu"
    assert not y.is_cuda
    assert y.is_cpu
    there = (x[1:], x + 1, x.double(), x.to(torch.float16), torch.zeros_like(x), y.cuda(), y.to(0))
    there += (y.to(x), x.new_ones(2), torch.tensor([1, 2], device=GPU), torch.stack([x, x])[0])
    assert all(tensor.device == GPU for tensor in there)
    here = (x.cpu(), x.to("cpu", torch.float64), torch.empty_like(x, device="cpu"), y.to(y))
    assert all(tensor.device.type == "cpu" for tensor in here)
    assert torch.equal(x.cpu(), y)
    assert x.cuda() is x
    assert x.to(GPU) is x
    assert torch.ones(2, device="meta").device.type == "meta"


def test_modules_gradients_and_files_stay_on_it(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2).to("cuda")
    seen = []
    y = layer(on_gpu(4, 3))
    y.register_hook(lambda gradient: seen.append(gradient.device))
    y.square().sum().backward()
    assert layer.weight.grad is not None
    assert [layer.weight.device, layer.weight.grad.device, *seen] == [GPU] * 3
    (gradient,) = torch.autograd.grad(layer(on_gpu(1, 3)).sum(), [layer.bias])
    assert gradient.device == GPU
    start = torch.ones(2, requires_grad=True)
    (start.to("cuda") * 3).sum().backward()
    assert start.grad is not None
    assert start.grad.device.type == "cpu"
    with torch.inference_mode():
        assert layer(on_gpu(1, 3)).device == GPU
    save_file({"w": layer.weight.detach()}, tmp_path / "w")
    assert load_file(tmp_path / "w", device="cuda")["w"].device == GPU
    assert load_file(tmp_path / "w")["w"].device.type == "cpu"


def test_threads_of_a_pool_take_part() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: on_gpu(2).device).result() == GPU


def test_what_a_gpu_allows_beside_its_tensors() -> None:
    x, one = on_gpu(4), torch.tensor(2.0)
    assert (x * one).device == GPU
    assert torch.where(x > 0, one, x).device == GPU
    assert x[torch.tensor([0, 2])].device == GPU
    here = torch.zeros(4)
    here.copy_(x)
    x[:2] = torch.zeros(2)
    assert here.device.type == "cpu"
    assert here.tolist() == [1.0] * 4
    assert x.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert float(x.sum()) == 2.0


TWO_DEVICES = "Expected all tensors to be on the same device"
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "sum": (lambda: on_gpu(3) + torch.ones(3), RuntimeError, TWO_DEVICES),
    "product": (lambda: on_gpu(2, 2) @ torch.ones(2, 2), RuntimeError, TWO_DEVICES),
    "module": (lambda: nn.Linear(2, 2)(on_gpu(1, 2)), RuntimeError, TWO_DEVICES),
    "mask": (lambda: on_gpu(2).masked_fill_(torch.ones(2) > 0, 1), RuntimeError, TWO_DEVICES),
    "cat": (lambda: torch.stack([on_gpu(1)[0], torch.tensor(1.0)]), RuntimeError, TWO_DEVICES),
    "gpu scalar": (lambda: torch.ones(2) * on_gpu(1)[0], RuntimeError, TWO_DEVICES),
    "in place": (lambda: torch.tensor(0.0).add_(on_gpu(1)[0]), RuntimeError, TWO_DEVICES),
    "out": (lambda: torch.add(on_gpu(1), 1, out=torch.ones(1)), RuntimeError, TWO_DEVICES),
    "index": (lambda: torch.ones(2)[on_gpu(1).long()], RuntimeError, "indices should be either"),
    "numpy": (lambda: on_gpu(1).numpy(), TypeError, "cuda:0 device type tensor to numpy"),
    "array": (lambda: np.asarray(on_gpu(1)), TypeError, "cuda:0 device type tensor to numpy"),
    "generator": (
        lambda: torch.randn(2, generator=torch.Generator(), device="cuda"),
        RuntimeError,
        "'cuda' device type for generator",
    ),
    "integers": (lambda: on_gpu(2, 2).int() @ on_gpu(2, 2).int(), RuntimeError, "addmm_cuda"),
    "second": (lambda: torch.ones(1, device="cuda:1"), RuntimeError, "invalid device ordinal"),
    "meta": (lambda: torch.ones(1, device="meta").cuda(), NotImplementedError, "meta tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_refuses(name: str) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()
