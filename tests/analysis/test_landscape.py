"""Landscapes of quadratics, and what filter normalisation makes equal."""

import pytest
import torch

from fairseq_sam.analysis.landscape import difference, filter_normalised, landscape, steps
from fairseq_sam.analysis.objective import Objective
from tests.analysis.models import Network, classes_data, classes_loss, quadratic_loss, random_quadratic


def test_plane_of_a_quadratic():
    model = random_quadratic()
    objective, start = Objective(model, [1.0, 2.0], quadratic_loss), model.w.detach().clone()
    first, second = torch.ones(6).double(), torch.linspace(-1, 1, 6).double()
    places = [(x, y) for x in steps(-1, 1, 3) for y in steps(0, 2, 2)]
    found = list(landscape(objective, [[first], [second]], places, score=lambda: {"w": float(model.w[0].detach())}))
    assert [point.place for point in found] == places
    for (x, y), point in zip(places, found, strict=True):
        w = start + x * first + y * second
        assert point.loss == pytest.approx(float(0.5 * w @ model.A @ w), rel=1e-12)
        assert point.scores["w"] == pytest.approx(float(w[0]), rel=1e-12)


def test_weights_are_back_between_points():
    model = random_quadratic()
    start = model.w.detach().clone()
    points = landscape(Objective(model, [1.0], quadratic_loss), [[torch.ones(6).double()]], [(1.0,), (2.0,)])
    next(points)
    assert torch.equal(model.w, start)
    points.close()
    assert torch.equal(model.w, start)


def test_line_between_two_models():
    before, after = random_quadratic(seed=0), random_quadratic(seed=1)
    objective = Objective(after, [1.0], quadratic_loss)
    direction = difference(objective, before.state_dict())
    ends = [point.loss for point in landscape(objective, [direction], [(-1.0,), (0.0,)])]
    w = before.w.detach()
    assert ends[0] == pytest.approx(float(0.5 * w @ after.A @ w), rel=1e-12) and ends[1] == objective.loss()


def test_what_other_weights_lack_is_held_constant():
    objective = Objective(Network(), [classes_data()], classes_loss)
    others = {"first.weight": torch.zeros(6, 4), "pooler": torch.ones(3)}
    direction = dict(zip(objective.space.names, difference(objective, others), strict=True))
    torch.testing.assert_close(direction.pop("first.weight"), objective.model.first.weight.detach())
    assert len(direction) == 5 and not any(d.any() for d in direction.values())


def test_filters_have_the_models_norms():
    objective = Objective(Network(), [classes_data()], classes_loss)
    direction = filter_normalised(objective, seed=3)
    for name, d, parameter in zip(objective.space.names, direction, objective.parameters, strict=True):
        if parameter.dim() < 2:
            assert not d.any(), name
        else:
            torch.testing.assert_close(d.norm(dim=1), parameter.detach().norm(dim=1))
    other = filter_normalised(objective, seed=4)
    assert not torch.equal(direction[0], other[0])
    assert torch.equal(direction[0], filter_normalised(objective, seed=3)[0])


def test_surface_does_not_see_the_scale_of_filters():
    """Rows of a ReLU layer times c, the next layer's columns over c: the same function, the same surface."""
    model = Network()
    model.forward = lambda x: model.last(torch.relu(model.first(x)))
    with torch.no_grad():
        model.first.bias.zero_()
    objective = Objective(model, [classes_data()], classes_loss)
    places = [(x,) for x in steps(-1, 1, 5)]

    def surface():
        direction = filter_normalised(objective, seed=1)
        direction[objective.space.names.index("last.weight")].zero_()  # its filters are rows, the factors columns
        return [point.loss for point in landscape(objective, [direction], places)]

    before = surface()
    factors = torch.tensor([0.1, 3.0, 1.0, 20.0, 0.5, 2.0], dtype=torch.float64)
    with torch.no_grad():
        model.first.weight.mul_(factors[:, None])
        model.last.weight.div_(factors)
    assert surface() == pytest.approx(before, rel=1e-10) and max(before) > min(before) + 0.1


def test_a_filter_of_zeros_is_not_moved():
    model = Network()
    with torch.no_grad():
        model.first.weight[2] = 0.0
    direction = filter_normalised(Objective(model, [classes_data()], classes_loss), seed=1)
    assert not direction[0][2].any() and direction[0][1].any()


def test_bad_values():
    objective = Objective(random_quadratic(), [1.0], quadratic_loss)
    with pytest.raises(ValueError, match=r"expected 1 coordinates, got \(1.0, 2.0\)"):
        list(landscape(objective, [[torch.ones(6).double()]], [(1.0, 2.0)]))
    with pytest.raises(ValueError, match="expected models with parameters in common, but the other one lacks w"):
        difference(objective, {"v": torch.ones(6)})
    with pytest.raises(ValueError, match=r"expected w .*\(6,\) .* the other one's is \(2,\); .*--exclude"):
        difference(objective, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match="number must be an integer >= 1, got 0"):
        steps(0, 1, 0)
    with pytest.raises(ValueError, match="least must be at most most, got 1 and 0"):
        steps(1, 0, 3)
    assert steps(-1, 1, 1) == [0.0]
