"""The Hessian of a small fairseq Transformer against another library's, curvlinops.

curvlinops takes ``torch.func.jvp`` of ``torch.func.jacrev``. In torch 2.13 that is wrong for the weight of a layer norm
(``test_what_is_wrong_with_the_weight_of_a_layer_norm``), so that the two are compared with these weights held constant;
ours is also compared with finite differences, with all weights.
"""

import importlib.util

import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

pytest.importorskip("fairseq")
from fairseq_sam.analysis.objective import Objective, evaluating, twice_differentiable
from fairseq_sam.analysis.spectrum import flat, hessian_eigenvalues, unflat
from tests.adapter import runs

if importlib.util.find_spec("curvlinops") is None:  # half an installation is an error, not a reason to skip
    pytest.skip("curvlinops is not installed; user_dir_setup.py test installs it", allow_module_level=True)
import curvlinops


class Logits(nn.Module):
    """The logits of all target tokens that are not padding."""

    def __init__(self, model, pad):
        super().__init__()
        self.model, self.pad = model, pad

    def forward(self, sample):
        logits = self.model(**sample["net_input"])[0]
        return logits[sample["target"].ne(self.pad)]


@pytest.fixture(scope="module")
def transformer(translation_data):
    """An untrained model in float64 and batches of different sizes, with padding."""
    trainer, batches = runs.build_trainer(
        translation_data,
        *runs.TRANSLATION,
        "--encoder-learned-pos",
        "--decoder-learned-pos",
        "--activation-fn",
        "gelu",
        "--optimizer",
        "adam",
    )
    model, pad = trainer.get_model().double(), trainer.task.target_dictionary.pad()
    batches = sorted(batches, key=lambda batch: batch["ntokens"])[::6]
    assert len({batch["ntokens"] for batch in batches}) > 1 and any(batch["target"].eq(pad).any() for batch in batches)
    return model, batches, pad


def objective_of(transformer, exclude=""):
    model, batches, pad = transformer

    def loss_sum(model, batch):
        logits = model(**batch["net_input"])[0]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["target"].flatten(), ignore_index=pad, reduction="sum"
        )
        return loss, float(batch["ntokens"])

    return Objective(model, batches, loss_sum, exclude=exclude)


def other_hessian(transformer, parameters):
    """curvlinops' operator: the mean over tokens, each batch weighted by how many it has."""
    model, batches, pad = transformer
    data = [(batch, batch["target"][batch["target"].ne(pad)]) for batch in batches]
    return curvlinops.HessianLinearOperator(
        Logits(model, pad), nn.CrossEntropyLoss(), list(parameters), data,
        batch_size_fn=lambda batch: int(batch["ntokens"]),
    )  # fmt: skip


def random_vector(objective):
    return torch.randn(objective.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_products_and_eigenvalues_agree(transformer):
    objective = objective_of(transformer, exclude=r"layer_norm\.weight")
    vector = random_vector(objective)
    with evaluating(transformer[0]), twice_differentiable():
        other = other_hessian(transformer, objective.parameters)
        expected = other @ vector
        largest, _ = eigsh(other.to_scipy(), k=5, which="LA", tol=1e-7)
    found = flat(objective.hessian_product(unflat(vector, objective.parameters)))
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    eigenvalues = hessian_eigenvalues(objective, 5, steps=60).values
    torch.testing.assert_close(eigenvalues, torch.tensor(sorted(largest, reverse=True)), rtol=1e-4, atol=1e-6)


def test_products_are_differences_of_gradients(transformer):
    objective = objective_of(transformer)
    vector = random_vector(objective)
    found = flat(objective.hessian_product(unflat(vector, objective.parameters)))
    gradients = []
    for step in (1e-6, -1e-6):
        with objective.moving() as move:
            move(unflat(step * vector, objective.parameters))
            gradients.append(flat(objective.loss_and_gradient()[1]))
    differences = (gradients[0] - gradients[1]) / 2e-6
    assert float((found - differences).norm() / differences.norm()) < 5e-3


def test_what_is_wrong_with_the_weight_of_a_layer_norm():
    """If this fails, torch is mended, and these weights can be compared too."""
    generator = torch.Generator().manual_seed(0)
    x, t, A, w, direction = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (5, 4), (4, 4), (4,), (4, 4))
    )

    def loss(A, w):
        return (nn.functional.layer_norm(x @ A, (4,), w) * t).sin().sum()

    def change_of(gradient):
        return torch.func.jvp(lambda A: gradient(loss, argnums=1)(A, w), (A,), (direction,))[1]

    right, wrong = change_of(torch.func.grad), change_of(torch.func.jacrev)
    gradients = [torch.func.grad(loss, argnums=1)(A + step * direction, w) for step in (1e-6, -1e-6)]
    torch.testing.assert_close(right, (gradients[0] - gradients[1]) / 2e-6, rtol=1e-6, atol=1e-6)
    assert float((wrong - right).abs().max()) > 1e-3
