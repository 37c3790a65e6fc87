"""The objective: weighted means, derivatives against dense ones, and nothing left behind."""

import pytest
import torch
from torch import nn

from fairseq_sam.analysis.objective import Objective, twice_differentiable
from tests.analysis.models import (
    Logistic,
    Network,
    classes_data,
    classes_loss,
    cut,
    logistic_data,
    logistic_loss,
    quadratic_loss,
    random_quadratic,
)


def whole_hessian(objective):
    rows = []
    for i in range(objective.size):
        unit = torch.zeros(objective.size, dtype=torch.float64)
        unit[i] = 1.0
        parts = unit.split([p.numel() for p in objective.parameters])
        vectors = [part.view_as(p) for part, p in zip(parts, objective.parameters, strict=True)]
        rows.append(torch.cat([g.reshape(-1) for g in objective.hessian_product(vectors)]))
    return torch.stack(rows)


def test_quadratic_with_uneven_batches():
    model = random_quadratic()
    objective = Objective(model, [1.0, 2.5, 4.0], quadratic_loss)
    loss, (gradient,) = objective.loss_and_gradient()
    assert objective.loss() == pytest.approx(float(model.loss().detach()), rel=1e-14) == loss
    torch.testing.assert_close(gradient, model.A @ model.w.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(whole_hessian(objective), model.A, rtol=1e-13, atol=1e-13)
    assert objective.weight == 7.5


def test_logistic_hessian_of_uneven_batches():
    x, y = logistic_data()
    model = Logistic(torch.linspace(-1, 1, 5, dtype=torch.float64))
    objective = Objective(model, cut((x, y), 3, 16, 1), logistic_loss)
    p = torch.sigmoid(x @ model.w.detach())
    torch.testing.assert_close(whole_hessian(objective), x.T @ ((p * (1 - p))[:, None] * x) / 20, rtol=1e-12, atol=0)
    torch.testing.assert_close(objective.loss_and_gradient()[1][0], x.T @ (p - y) / 20, rtol=1e-12, atol=1e-15)


def test_nothing_is_left_behind():
    model = Network().train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    objective = Objective(model, cut(classes_data(), 5, 7), classes_loss)
    first = objective.loss()
    state = torch.get_rng_state()
    objective.loss_and_gradient()
    objective.hessian_product(objective.zeros())
    with objective.moving() as move:
        move([torch.ones_like(parameter) for parameter in model.parameters()])
        assert objective.loss() != first
    assert objective.loss() == first  # dropout is off
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value) and torch.equal(parameter.grad, torch.ones_like(parameter))


def test_excluded_parameters_are_constants():
    objective = Objective(Network(), cut(classes_data(), 12), classes_loss, exclude="bias|norm")
    assert objective.space.names == ("first.weight", "last.weight") and objective.size == 4 * 6 + 6 * 3
    assert [g.shape for g in objective.loss_and_gradient()[1]] == [(6, 4), (3, 6)]


def test_an_iterator_of_batches_is_kept():
    objective = Objective(random_quadratic(), iter([1.0, 2.0]), quadratic_loss)
    assert objective.loss() == objective.loss()


def test_unused_parameters_have_zero_derivatives():
    model = random_quadratic()
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    objective = Objective(model, [1.0], quadratic_loss)
    assert objective.loss_and_gradient()[1][1].tolist() == [0.0, 0.0]
    assert objective.hessian_product([torch.ones_like(p) for p in objective.parameters])[1].tolist() == [0.0, 0.0]


def test_a_linear_loss_has_no_curvature():
    model = nn.Linear(3, 1, bias=False).double()
    objective = Objective(model, [torch.ones(2, 3).double()], lambda model, x: (model(x).sum(), 2.0))
    assert objective.hessian_product([torch.ones(1, 3).double()])[0].tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("call", ["loss", "loss_and_gradient"])
@pytest.mark.parametrize("batches", [[], [0.0]])
def test_no_data(call, batches):
    objective = Objective(random_quadratic(), batches, quadratic_loss)
    with pytest.raises(ValueError, match="positive total weight, got 0 in all"):
        getattr(objective, call)()


def test_attention_and_recurrence_have_second_derivatives():
    torch.manual_seed(0)

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.lstm = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x):
            attended = self.attention(x, x, x, need_weights=False)[0]
            return self.lstm(attended)[0].square().sum()

    model, x = Reader(), torch.randn(2, 5, 8)
    objective = Objective(model, [x], lambda model, x: (model(x), 2.0))
    vector = [torch.randn_like(p) for p in model.parameters()]
    product = objective.hessian_product(vector)
    gradients = []
    for sign in (1, -1):
        with objective.moving() as move:
            move([sign * 1e-2 * v for v in vector])
            gradients.append(objective.loss_and_gradient()[1])
    for found, up, down in zip(product, *gradients, strict=True):
        torch.testing.assert_close(found, (up - down) / 2e-2, rtol=0.1, atol=0.02 * float(found.abs().max()) + 1e-4)
    with twice_differentiable():
        pass


def test_recurrent_layers_run_without_cudnn():
    """cuDNN's have no gradient in evaluation mode; it is on again afterwards."""
    seen = []

    def loss_sum(model, batch):
        seen.append((model.training, torch.backends.cudnn.enabled))
        return quadratic_loss(model, batch)

    objective = Objective(random_quadratic(), [1.0], loss_sum)
    objective.loss_and_gradient()
    objective.gradient_of(1.0)
    objective.hessian_product(objective.zeros())
    assert seen == [(False, False)] * 3 and torch.backends.cudnn.enabled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: cuDNN's LSTM needs one")
def test_lstm_on_a_gpu():
    """Gradient and Hessian product of an LSTM are those of the CPU."""
    torch.manual_seed(0)
    lstm, x = nn.LSTM(3, 4, 2, dropout=0.5).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        model, batch = lstm.to(device), x.to(device)
        objective = Objective(model, [batch], lambda model, batch: (model(batch)[0].square().sum(), 1.0))
        gradients = objective.loss_and_gradient()[1]
        found.append([t.cpu() for t in (*gradients, *objective.hessian_product(gradients))])
    torch.testing.assert_close(*found)
