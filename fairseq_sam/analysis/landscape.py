"""The loss along lines and planes through the weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fairseq_sam.analysis.objective import Objective
from fairseq_sam.analysis.sharpness import gaussian


@dataclass(frozen=True)
class Point:
    """A place of a landscape.

    Attributes:
        place: coordinates along the directions.
        loss: L there, per unit of weight.
        scores: what else was measured there, by name.
    """

    place: tuple[float, ...]
    loss: float
    scores: Mapping[str, float] = field(default_factory=dict)


def landscape(
    objective: Objective,
    directions: Sequence[Sequence[Tensor]],
    places: Iterable[tuple[float, ...]],
    *,
    score: Callable[[], Mapping[str, float]] = dict,
) -> Iterator[Point]:
    """Measure L at ``w + x_1 d_1 + x_2 d_2 + ...``.

    The weights are back at w, bit for bit, before each point is handed out, so that the caller may write it down and
    stop at any time.

    Args:
        objective: L, with weights and data.
        directions: d_1, d_2, ..., each a tensor of every parameter's shape.
        places: coordinates, as many numbers as there are directions.
        score: measures more of the moved model.

    Yields:
        The points, in the order of the places.

    Raises:
        ValueError: if a place has another number of coordinates, or there is no data.
    """
    for place in places:
        if len(place) != len(directions):
            raise ValueError(f"expected {len(directions)} coordinates, got {place!r}")
        displacement = objective.zeros()
        for coordinate, direction in zip(place, directions, strict=True):
            torch._foreach_add_(displacement, list(direction), alpha=coordinate)
        with objective.moving() as move:
            move(displacement)
            point = Point(tuple(place), objective.loss(), dict(score()))
        yield point


def difference(objective: Objective, others: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the direction ``w - v`` from other weights v to the model's (FSAM Fig. 5: from the pretrained weights).

    Parameters that the others lack, such as the head of a task that a pretrained model was fine-tuned on, are held
    constant: there the direction is 0.

    Args:
        objective: the model with weights w.
        others: v, by the parameters' names; those that the model lacks do not count.

    Raises:
        ValueError: if a parameter has another shape there, or all are missing.
    """
    found = []
    for name, parameter in zip(objective.space.names, objective.parameters, strict=True):
        other = others.get(name, parameter.detach())
        if other.shape != parameter.shape:
            raise ValueError(
                f"expected {name} with the shape {tuple(parameter.shape)} in both models, but the other one's is "
                f"{tuple(other.shape)}; parameters of other shapes must be excluded (--exclude)"
            )
        found.append(parameter.detach() - other.to(parameter))
    if not set(others) & set(objective.space.names):
        raise ValueError(
            f"expected models with parameters in common, but the other one lacks {objective.space.names[0]} "
            "and all others"
        )
    return found


def filter_normalised(objective: Objective, seed: int) -> list[Tensor]:
    """Draw a Gaussian direction, each of whose filters has the norm of the model's filter (Li et al. 2018).

    A filter is a slice of a weight's first dimension. Vectors (biases, layer norms) are not moved, as in the paper.

    Args:
        objective: the model.
        seed: of the random numbers.
    """
    direction = gaussian(objective, seed)
    for d, parameter in zip(direction, objective.parameters, strict=True):
        if parameter.dim() < 2:
            d.zero_()
            continue
        dims = tuple(range(1, parameter.dim()))
        norms = torch.linalg.vector_norm(d, dim=dims, keepdim=True)
        wanted = torch.linalg.vector_norm(parameter.detach(), dim=dims, keepdim=True)
        d.mul_(wanted / norms.clamp(min=torch.finfo(d.dtype).tiny))
    return direction


def steps(least: float, most: float, number: int) -> list[float]:
    """Return evenly spaced coordinates, both ends included.

    Args:
        least: the first.
        most: the last.
        number: how many, >= 1; one is the middle.

    Raises:
        ValueError: if there are fewer than one or the ends are in the wrong order.
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"number must be an integer >= 1, got {number!r}")
    if not least <= most:
        raise ValueError(f"least must be at most most, got {least!r} and {most!r}")
    if number == 1:
        return [(least + most) / 2]
    return [least + (most - least) * i / (number - 1) for i in range(number)]
