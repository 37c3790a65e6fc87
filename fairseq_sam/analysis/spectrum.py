"""Eigenvalues of the Hessian, and of the Fisher information that stands for it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hessian_eigenthings import LambdaOperator, hutchinson, spectral_density
from hessian_eigenthings.algorithms.lanczos import lanczos_tridiagonal
from torch import Tensor, nn

from fairseq_sam.analysis.corruption import Progress, unseen
from fairseq_sam.analysis.memory import check_memory
from fairseq_sam.analysis.objective import LossSum, Objective

TOP = 50  # GA-SAM Fig. 3
CONVERGED = 0.01
MOST_NUMBERS = 2**28
WORKING_VECTORS = 6  # at the same time, in a step of Lanczos and a Hessian product


@dataclass(frozen=True)
class Eigenvalues:
    """The largest eigenvalues.

    Attributes:
        values: eigenvalues, the largest first.
        residuals: for each, the norm of ``H v - lambda v``, v its unit eigenvector, as Lanczos estimates it from its
            last step, without a further product; 0 where they are exact.
    """

    values: Tensor  # (k,)
    residuals: Tensor  # (k,)

    @property
    def converged(self) -> Tensor:
        """Whether each residual is at most 1 % of its eigenvalue, ``(k,)``.

        The residual bounds the distance to the nearest eigenvalue: one that has not converged may be that of another
        rank, and far from its own.
        """
        return self.residuals <= CONVERGED * self.values.abs()

    @property
    def known(self) -> Tensor:
        """Whether each has converged, and all larger ones too, ``(k,)``: else others may be missing before it."""
        return self.converged.cummin(0).values


@dataclass(frozen=True)
class Trace:
    """An estimate of a trace.

    Attributes:
        value: the estimate.
        error: its standard error.
    """

    value: float
    error: float


@dataclass(frozen=True)
class Quadrature:
    """What stochastic Lanczos quadrature knows of all eigenvalues: shares of them at a few places.

    Attributes:
        nodes: the places (Ritz values), of all runs.
        weights: shares of all eigenvalues, whose sum is 1.
        steps: of Lanczos in a run.
    """

    nodes: Tensor  # (N,), float64, on the CPU
    weights: Tensor  # (N,)
    steps: int

    @property
    def width(self) -> float:
        """What it can resolve: the distance between its smallest and its largest place, over its steps."""
        return max(float(self.nodes.max() - self.nodes.min()), 1e-9) / self.steps


@dataclass(frozen=True)
class Density:
    """A smoothed density of eigenvalues.

    Attributes:
        grid: eigenvalues.
        density: share of all eigenvalues for a unit of the axis; its integral is 1.
        width: standard deviation of the Gaussian that smooths it.
    """

    grid: Tensor  # (points,), float64
    density: Tensor  # (points,)
    width: float


def hessian_eigenvalues(
    objective: Objective, k: int = TOP, *, steps: int | None = None, seed: int = 1, progress: Progress = unseen
) -> Eigenvalues:
    """Compute the k largest eigenvalues of the Hessian of L, by Lanczos with full reorthogonalisation.

    Of an eigenvalue that is there several times one run finds one; where a run has seen all that it can see, another
    begins in what is orthogonal to it.

    Args:
        objective: L, with weights and data.
        k: how many, from 1 to the number of weights.
        steps: of Lanczos, each a Hessian product (two passes' cost) and a vector of the weights' size in memory;
            default ``6 k + 20``, or the number of weights if that is less. The smallest of the k converge last.
        seed: of the first vector.
        progress: called after each step.

    Returns:
        The eigenvalues, with their residuals; see ``Eigenvalues.converged``.

    Raises:
        ValueError: if k or `steps` is out of range, there is too little memory or no data.
    """
    _check("k (--top)", k, 1, objective.size)
    number = min(6 * k + 20, objective.size) if steps is None else steps
    _check("steps (--steps)", number, k, objective.size)
    check_lanczos(objective, number, k)
    operator = hessian_operator(objective, number, progress)
    generator = torch.Generator().manual_seed(seed)
    basis: list[Tensor] = []
    values, residuals = (torch.empty(0, dtype=operator.dtype, device=operator.device) for _ in range(2))
    while len(basis) < number:
        start = torch.randn(operator.size, dtype=operator.dtype, generator=generator).to(operator.device)
        found = lanczos_tridiagonal(apart_from(basis, operator), without(basis, start), number - len(basis))
        ritz, vectors = torch.linalg.eigh(torch.diag(found.alphas) + torch.diag(found.betas, 1), UPLO="U")
        largest = ritz.max()
        is_first, is_whole = not basis, found.iterations < number - len(basis)
        values, residuals = torch.cat([values, ritz]), torch.cat([residuals, vectors[-1].abs() * found.last_beta])
        order = values.argsort(descending=True)
        values, residuals, basis = values[order], residuals[order], basis + found.basis
        if not is_whole or (not is_first and len(values) > k and largest < values[k - 1]):
            break
    return Eigenvalues(values[:k], residuals[:k])


def without(basis: Sequence[Tensor], vector: Tensor) -> Tensor:
    """Return the part of a vector that is orthogonal to others, which are so to one another and have length 1."""
    for each in basis:
        vector = vector - torch.dot(each, vector) * each
    return vector


def apart_from(basis: Sequence[Tensor], operator: LambdaOperator) -> LambdaOperator:
    """Return an operator on what is orthogonal to some vectors."""
    if not basis:
        return operator
    return LambdaOperator(
        lambda vector: without(basis, operator.matvec(vector)), operator.size, operator.device, operator.dtype
    )


def fisher_eigenvalues(
    model: nn.Module,
    instances: Sequence[Any],
    loss_sum: LossSum,
    k: int = TOP,
    *,
    exclude: str = "",
    block: int | None = None,
    progress: Progress = unseen,
) -> Eigenvalues:
    """Compute the k largest eigenvalues of the empirical Fisher information of some instances, exactly.

    ``F = sum_i g_i g_i' / sum_i c_i``, with the gradient g_i of the summed loss and the weight c_i of instance i. For a
    loss in nats F equals its Hessian where the model's probabilities are those of the data (the assumption of Pascanu
    and Bengio 2013 that GA-SAM 5.3 makes); one in bits has an F that is 1 / ln 2 times too large for that. F has
    at most as many eigenvalues above 0 as there are instances;
    they are those of the instances' Gram matrix.

    Args:
        model: the model.
        instances: batches of one instance each.
        loss_sum: from model and batch to the batch's summed loss (a scalar with gradient) and its weight.
        k: how many, from 1 to the number of instances.
        exclude: regular expression; parameters whose name it matches are held constant.
        block: gradients that are kept at a time, twice; those of earlier blocks are computed again. Default as many as
            have 2^28 numbers together (1 GiB in float32).
        progress: called after each gradient.

    Returns:
        The eigenvalues.

    Raises:
        ValueError: if k or `block` is out of range, or the weights are all 0.
    """
    _check("k (--top)", k, 1, len(instances))
    objective = Objective(model, [], loss_sum, exclude=exclude)
    block = max(1, MOST_NUMBERS // objective.size) if block is None else block
    _check("block", block, 1)
    blocks = [range(start, min(start + block, len(instances))) for start in range(0, len(instances), block)]
    total = sum(len(part) for i, _ in enumerate(blocks) for part in blocks[i:])
    done, weight = 0, 0.0

    def gradients(part: Iterable[int]) -> Tensor:
        nonlocal done
        rows, sizes = [], []
        for i in part:
            tensors, size = objective.gradient_of(instances[i])
            rows.append(flat(tensors))
            sizes.append(size)
            done += 1
            progress(done, total)
        weights.update(zip(part, sizes, strict=True))
        return torch.stack(rows)

    weights: dict[int, float] = {}
    gram = torch.zeros(len(instances), len(instances), dtype=torch.float64)
    for number, rows in enumerate(blocks):
        first = gradients(rows)
        for columns in blocks[number:]:
            second = first if columns is rows else gradients(columns)
            product = (first @ second.T).double().cpu()
            gram[rows.start : rows.stop, columns.start : columns.stop] = product
            gram[columns.start : columns.stop, rows.start : rows.stop] = product.T
    weight = sum(weights.values())
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the loss of an instance has no finite gradient at the model's weights")
    if not weight > 0:
        raise ValueError(f"expected instances with a positive total weight, got {weight:g} in all")
    values = torch.linalg.eigvalsh(gram / weight).flip(0)[:k]
    return Eigenvalues(values, torch.zeros_like(values))


def hessian_trace(objective: Objective, samples: int = 30, *, seed: int = 1, progress: Progress = unseen) -> Trace:
    """Estimate the trace of the Hessian of L by Hutchinson's method with signs.

    Args:
        objective: L, with weights and data.
        samples: number of Hessian products, >= 2.
        seed: of the random vectors.
        progress: called after each product.

    Raises:
        ValueError: if `samples` is out of range, or there is no data.
    """
    _check("samples", samples, 2)
    found = hutchinson(hessian_operator(objective, samples, progress), num_samples=samples, seed=seed)
    return Trace(found.estimate, found.stderr)


def hessian_density(
    objective: Objective,
    *,
    steps: int = 80,
    runs: int = 1,
    seed: int = 1,
    progress: Progress = unseen,
) -> Quadrature:
    """Estimate how the Hessian's eigenvalues are distributed, by stochastic Lanczos quadrature.

    Args:
        objective: L, with weights and data.
        steps: of Lanczos in each run, from 1 to the number of weights; their number is the resolution.
        runs: from different random vectors, >= 1; their mean is taken.
        seed: of the first run's vector.
        progress: called after each Hessian product.

    Returns:
        Places and shares; ``smoothed`` makes a density of them.

    Raises:
        ValueError: if a number is out of range, there is too little memory or no data.
    """
    _check("steps (--density-steps)", steps, 1, objective.size)
    _check("runs", runs, 1)
    check_lanczos(objective, steps)
    operator = hessian_operator(objective, steps * runs, progress)
    found = spectral_density(operator, num_runs=runs, lanczos_steps=steps, num_grid_points=2, seed=seed)
    nodes, weights = (each.double().cpu() for each in (found.raw_eigenvalues, found.raw_weights))
    known = ~torch.isnan(nodes)  # a run may end early
    return Quadrature(nodes[known], weights[known] / weights[known].sum(), steps)


def smoothed(found: Sequence[Quadrature], *, width: float | None = None, points: int | None = None) -> list[Density]:
    """Make densities that can be compared: on one grid, smoothed by the same Gaussian.

    Args:
        found: of each model.
        width: standard deviation of the Gaussian, > 0; default the largest of what each can resolve.
        points: of the grid, >= 2, which goes four widths beyond the outermost places; default at least 1000, and four
            in each width.

    Raises:
        ValueError: if a value is out of range.
    """
    width = max(each.width for each in found) if width is None else width
    if not 0 < width < float("inf"):
        raise ValueError(f"width must be a finite number > 0, got {width!r}")
    places = torch.cat([each.nodes for each in found])
    least, most = float(places.min()), float(places.max())
    if points is None:
        points = max(1000, math.ceil(4 * (most - least + 8 * width) / width))
    _check("points", points, 2)
    grid = torch.linspace(least - 4 * width, most + 4 * width, points, dtype=torch.float64)
    densities = []
    for each in found:
        kernel = torch.exp(-((grid[:, None] - each.nodes) ** 2) / (2 * width**2)) / (width * math.sqrt(2 * math.pi))
        densities.append(Density(grid, kernel @ each.weights, width))
    return densities


def check_lanczos(objective: Objective, steps: int, k: int = 0) -> None:
    """Refuse Lanczos with full reorthogonalisation where its vectors do not fit into the free memory.

    Each step keeps a vector of the weights' size, and so does each eigenvector at the end; beside them a few are at
    work. What the batches need is not counted.

    Args:
        objective: L, with weights and data.
        steps: of Lanczos.
        k: eigenvectors.

    Raises:
        ValueError: if they do not fit.
    """
    first = objective.parameters[0]
    vectors = steps + max(k, WORKING_VECTORS)
    check_memory(
        vectors * objective.size * first.element_size(),
        first.device,
        f"Lanczos of {steps} steps over {objective.size:,} weights",
        "lower --steps, --top or --density-steps, or hold parameters constant with --exclude",
    )


def hessian_operator(objective: Objective, products: int = 0, progress: Progress = unseen) -> LambdaOperator:
    """Return the Hessian of L as an operator of hessian-eigenthings, over the flat weights.

    The library's own operators weigh all batches alike and differentiate through fused attention; this one weighs
    batches by their size and uses kernels that have second derivatives.

    Args:
        objective: L, with weights and data.
        products: how many products are planned, which `progress` is told.
        progress: called after each product.

    Raises:
        ValueError: from a product that is not finite.
    """
    done = 0

    def product(vector: Tensor) -> Tensor:
        nonlocal done
        result = flat(objective.hessian_product(unflat(vector, objective.parameters)))
        if not bool(torch.isfinite(result).all()):
            raise ValueError("the loss has no finite second derivatives at the model's weights")
        done += 1
        progress(done, max(done, products))
        return result

    first = objective.parameters[0]
    return LambdaOperator(product, objective.size, first.device, first.dtype)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors into one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflat(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a vector into tensors of the shapes of others."""
    parts = torch.split(vector, [tensor.numel() for tensor in like])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _check(name: str, value: int, least: int, most: float = float("inf")) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        allowed = f"an integer from {least} to {most:g}" if most < float("inf") else f"an integer >= {least}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
