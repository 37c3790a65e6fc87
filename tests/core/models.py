"""Small float64 models for tests of the engine, and their flat views."""

import numpy as np
import torch
from torch import nn

from fairseq_sam import PRESETS, InstanceBatch, Method
from fairseq_sam.core.scales import ScaleOperator, build_scale
from fairseq_sam.core.vectors import Vector


def scale_of(name, groups, weights, gradients, **options):
    """T of each tensor, broadcastable to it, and how many groups were capped."""
    found = build_scale(
        name, groups, Vector(list(weights), owned=False), Vector(list(gradients), owned=False), **options
    )
    if found.factors is None:
        return ScaleOperator([torch.ones((), dtype=torch.float64)] * len(weights), 0)
    return found


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.6)
    return model


class Reader(nn.Module):
    """Reads a row of numbers as a sentence of five words, some of them padding; for methods that perturb embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 3, padding_idx=0)
        self.hidden = nn.Linear(3, 6)
        self.out = nn.Linear(6, 2)

    @staticmethod
    def words(x: torch.Tensor) -> torch.Tensor:
        ids = (x.abs() * 4).long().clamp(max=7)
        return torch.cat([ids, ids[:, :1].clamp(min=1)], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.hidden(self.embedding(self.words(x)))).mean(1))


def reader(seed: int = 0, dtype: torch.dtype = torch.float64) -> Reader:
    generator = torch.Generator().manual_seed(seed)
    model = Reader().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.6)
    return model


def model_for(preset: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model that the preset can train."""
    return reader(dtype=dtype) if PRESETS[preset].where == "embeddings" else mlp(dtype=dtype)


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


def feed(method: Method, model: nn.Module, data, on_pass=lambda: None):
    """What `SharpnessAware.step` takes: a closure, or a batch of instances. Each pass calls `on_pass` first."""
    if method.needs_instances:

        def losses(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            on_pass()
            return (model(x) - y).square().mean(1)

        return InstanceBatch(losses, *data)

    def closure() -> torch.Tensor:
        on_pass()
        return closure_of(model, data)()

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


class Problem:
    """A model and a batch as functions of the flat weight vector, by torch.func and not through ``p.grad``."""

    def __init__(self, model: nn.Module, data) -> None:
        self.model, self.data = model, data
        self.shapes = {name: p.shape for name, p in model.named_parameters()}

    def _losses(self, vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([s.numel() for s in self.shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
        output = torch.func.functional_call(self.model, weights, (self.data[0],))
        return (output - self.data[1]).square().mean(1)

    def losses(self, w: np.ndarray) -> np.ndarray:
        return self._losses(torch.tensor(w)).detach().numpy()

    def instance_gradients(self, w: np.ndarray) -> np.ndarray:
        return torch.func.jacrev(self._losses)(torch.tensor(w)).detach().numpy()

    def gradient(self, w: np.ndarray, rows=None) -> np.ndarray:
        gradients = self.instance_gradients(w)
        return (gradients if rows is None else gradients[np.asarray(rows)]).mean(0)


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
    "efficient_sam": {"epsilon": 0.1},
    "msam": {"epsilon": 0.1, "m": 3},
    "fisher_sam": {"epsilon": 0.3, "sparsity": 0.6, "mask_interval": 7, "fisher_samples": 12},
    "esam": {"epsilon": 0.1},
    "gsam": {"epsilon": 0.1},
    "delta_sam": {"epsilon": 0.1},
    "instance_sam": {"epsilon": 0.1},
    "random_sam": {"epsilon": 0.3},
    "model_perturbation": {"epsilon": 0.1, "step_size": 0.5, "steps": 2},
    "awp": {"epsilon": 0.05},
    "look_sam": {"epsilon": 0.1, "interval": 3},
    "freelb": {"epsilon": 0.1, "steps": 2},
}
assert SETTINGS.keys() == PRESETS.keys(), "every preset needs a test case"
