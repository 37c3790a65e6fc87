"""Float64 models and losses whose Hessians are known."""

import torch
from torch import Tensor, nn


class Quadratic(nn.Module):
    """``(w - c)' A (w - c) / 2`` for each unit of a batch, which is a number: its weight."""

    def __init__(self, A: Tensor, w: Tensor, c: Tensor | None = None) -> None:
        super().__init__()
        self.A, self.c = A, torch.zeros_like(w) if c is None else c
        self.w = nn.Parameter(w.clone())

    def loss(self) -> Tensor:
        shift = self.w - self.c
        return 0.5 * shift @ self.A @ shift


def quadratic_loss(model: Quadratic, batch: float) -> tuple[Tensor, float]:
    return batch * model.loss(), batch


def random_quadratic(size: int = 6, seed: int = 0) -> Quadratic:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return Quadratic(root @ root.T / size, torch.randn(size, generator=generator, dtype=torch.float64))


class Logistic(nn.Module):
    """Logistic regression; batches are pairs of inputs ``(n, d)`` and labels 0 or 1 ``(n,)``."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())


def logistic_loss(model: Logistic, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    x, y = batch
    loss = nn.functional.binary_cross_entropy_with_logits(x @ model.w, y, reduction="sum")
    return loss, float(len(y))


def logistic_data(number: int = 20, size: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, size, generator=generator, dtype=torch.float64)
    return x, (torch.rand(number, generator=generator, dtype=torch.float64) < 0.5).double()


class Network(nn.Module):
    """A ReLU network with biases, dropout and layer norm; batches are pairs of inputs ``(n, 4)`` and classes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.dropout = nn.Dropout(0.5)
        generator = torch.Generator().manual_seed(seed)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(torch.tanh(self.norm(torch.relu(self.first(x))))))


def classes_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), float(len(batch[1]))


def classes_data(number: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (number,), generator=generator)


def cut(data: tuple[Tensor, ...], *sizes: int) -> list[tuple[Tensor, ...]]:
    """Batches of the given sizes."""
    return list(zip(*(tensor.split(list(sizes)) for tensor in data), strict=True))
