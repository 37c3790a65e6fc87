"""Task transfer: what an encoder that was fine-tuned on one task knows of others (FSAM 6.4)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

MOST_ITERATIONS = 2000


def linear_probe(known: Tensor, answers: Sequence[Any], new: Tensor, *, is_regression: bool = False) -> list[Any]:
    """Fit a linear classifier, or a regression, to features of a frozen encoder; return its answers to new ones.

    Features are scaled to mean 0 and standard deviation 1 over the known instances; the classifier is logistic
    regression, the regression is ridge regression, both with scikit-learn's default penalty.

    Args:
        known: features (N, size).
        answers: N labels, or numbers for a regression.
        new: features (M, size).
        is_regression: whether the answers are numbers.

    Returns:
        M answers.

    Raises:
        ValueError: if there are not as many answers as features, or a classifier has one label only.
    """
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(known) != len(answers):
        raise ValueError(f"expected as many answers as features, got {len(answers)} and {len(known)}")
    linear = Ridge() if is_regression else LogisticRegression(max_iter=MOST_ITERATIONS)
    model = make_pipeline(StandardScaler(), linear).fit(known.numpy(), list(answers))
    found: list[Any] = model.predict(new.numpy()).tolist()
    return found
