"""Small float64 models for tests of the engine, and their flat views."""

import numpy as np
import torch
from torch import nn

from fairseq_sam import PRESETS


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.6)
    return model


def batch(seed: int, size: int = 8, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(size, 2, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(data[0]) - data[1]).square().mean()


def closure_of(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]):
    def closure() -> torch.Tensor:
        loss = loss_of(model, data)
        loss.backward()
        return loss

    return closure


def flat(tensors) -> np.ndarray:
    return np.concatenate([t.detach().double().reshape(-1).numpy() for t in tensors])


def gradient_at(model: nn.Module, data):
    """Gradient of the loss as a function of the flat weight vector, by torch.func and not through ``p.grad``."""
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def gradient(w: np.ndarray) -> np.ndarray:
        vector = torch.tensor(w, dtype=torch.float64, requires_grad=True)
        parts = vector.split([s.numel() for s in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        output = torch.func.functional_call(model, weights, (data[0],))
        (result,) = torch.autograd.grad((output - data[1]).square().mean(), vector)
        return result.numpy()

    return gradient


def groups_of(model: nn.Module, granularity: str) -> np.ndarray:
    """Group number of each weight of the flat vector."""
    numbers, start = [], 0
    for name, p in model.named_parameters():
        size = p.numel()
        if granularity == "element":
            numbers.append(np.arange(start, start + size))
        elif granularity == "filter":
            numbers.append(start + np.repeat(np.arange(p.shape[0]), size // p.shape[0]))
        elif granularity == "tensor":
            numbers.append(np.full(size, start))
        elif granularity == "layer":
            numbers.append(
                np.full(
                    size,
                    sorted({n.rpartition(".")[0] for n, _ in model.named_parameters()}).index(name.rpartition(".")[0]),
                )
            )
        else:
            numbers.append(np.zeros(size, dtype=int))
        start += size
    return np.concatenate(numbers)


# One setting per preset that moves the weights by a visible amount on the small model.
SETTINGS = {
    "sam": {"epsilon": 0.1},
    "asam": {"epsilon": 0.3, "asam_eta": 0.01},
    "layer_sam": {"epsilon": 1e-2},
    "multistep_defense": {"epsilon": 0.02, "steps": 3},
    "ga_sam": {"epsilon": 0.02, "steps": 2},
}
assert SETTINGS.keys() == PRESETS.keys(), "every preset needs a test case"
