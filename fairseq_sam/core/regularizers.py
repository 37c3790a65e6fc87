"""Regularisers that ask for the same prediction in two passes: R-Drop, R3F and SMART."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from fairseq_sam.core.divergences import NUM_DIRECTIONS, Divergence
from fairseq_sam.core.embeddings import Perturb
from fairseq_sam.core.tensors import wide_dtype

NOISES = ("uniform", "normal")


class Passes(Protocol):
    """Further passes over the sample at hand, each with random masks of its own."""

    divergence: Divergence

    def repeat(self) -> tuple[Tensor, Tensor]:
        """Run the model and its loss; return the loss, summed over instances, and the prediction."""

    def predict(self, perturb: Perturb) -> Tensor:
        """Run the model with perturbed outputs of its word embeddings; return the prediction."""


def _flag(default: Any, text: str, minimum: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    allowed = f"one of {', '.join(choices)}" if choices else f">= {minimum:g}"
    return field(default=default, metadata={"help": f"{text}, {allowed}", "minimum": minimum, "choices": choices})


@dataclass(frozen=True)
class Regularizer:
    """Settings of one regulariser, named as its flags.

    Raises:
        ValueError: if a value is not allowed; names the flag, the value and the range.
    """

    def __post_init__(self) -> None:
        for flag in fields(self):
            value, minimum, choices = getattr(self, flag.name), flag.metadata["minimum"], flag.metadata["choices"]
            name = "--" + flag.name.replace("_", "-")
            if choices and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
            if not choices and not (math.isfinite(value) and value >= minimum):
                raise ValueError(f"{name} must be finite and >= {minimum:g}, got {value}")

    @property
    def is_active(self) -> bool:
        """Whether there is anything to add to the loss."""
        return True

    def __call__(self, loss: Tensor, prediction: Tensor, passes: Passes) -> tuple[Tensor, Tensor]:
        """Regularise one pass.

        Args:
            loss: loss of the first pass, summed over instances.
            prediction: its prediction.
            passes: runs further ones.

        Returns:
            The whole loss, and the part of it that is the regulariser's term.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class RDrop(Regularizer):
    """R-Drop: two passes with independent dropout predict the same.

    ``(loss_1 + loss_2) / 2 + alpha (KL(p || q) + KL(q || p)) / 2``; for regression ``alpha (p - q)^2`` in place of the
    divergence (Liang et al. 2021, equations 1 to 4).

    Differs from the paper: it adds the two losses, here their mean keeps the size of one pass. So an alpha here weighs
    as much as 2 alpha in the paper.

    Args:
        rdrop_alpha: weight of the divergence, >= 0; 0 is the mean loss of two passes. Default 1.
    """

    rdrop_alpha: float = _flag(1.0, "weight of the divergence of two passes", minimum=0)

    def __call__(self, loss: Tensor, prediction: Tensor, passes: Passes) -> tuple[Tensor, Tensor]:
        """See `Regularizer`."""
        second_loss, second = passes.repeat()
        weight = self.rdrop_alpha / NUM_DIRECTIONS[passes.divergence]
        term = weight * passes.divergence(prediction, second)
        return 0.5 * (loss + second_loss) + term, term


@dataclass(frozen=True)
class R3F(Regularizer):
    """R3F: a pass with noise on the outputs of the word embeddings predicts the same.

    ``loss + lambda (KL(p || q) + KL(q || p))``; for regression ``lambda (p - q)^2``, where q is the prediction at
    o + z, z uniform in [-eps, eps] or normal with standard deviation eps, 0 at padding (Aghajanyan et al. 2020,
    equation 5). The second pass has its own dropout masks.

    Args:
        r3f_lambda: weight of the term, >= 0; 0 is the loss alone, in one pass. Default 1.
        r3f_eps: size of the noise, >= 0. Default 1e-5.
        r3f_noise: "uniform" or "normal". Default "uniform".
    """

    r3f_lambda: float = _flag(1.0, "weight of the divergence from the pass with noise", minimum=0)
    r3f_eps: float = _flag(1e-5, "range or standard deviation of the noise", minimum=0)
    r3f_noise: str = _flag("uniform", "distribution of the noise", choices=NOISES)

    @property
    def is_active(self) -> bool:
        """Whether the weight is not 0."""
        return self.r3f_lambda > 0

    def __call__(self, loss: Tensor, prediction: Tensor, passes: Passes) -> tuple[Tensor, Tensor]:
        """See `Regularizer`."""
        term = self.r3f_lambda * passes.divergence(prediction, passes.predict(self.add_noise))
        return loss + term, term

    def add_noise(self, call: int, is_token: Tensor, output: Tensor) -> Tensor:
        """Return the output of a word embedding with noise; none at padding."""
        noise = _empty_like(output)
        if self.r3f_noise == "uniform":
            noise.uniform_(-self.r3f_eps, self.r3f_eps)
        else:
            noise.normal_(0.0, self.r3f_eps)
        return output + (noise * is_token).to(output.dtype)


@dataclass(frozen=True)
class Smart(Regularizer):
    """SMART's smoothness-inducing adversarial regulariser: the worst pass in a small ball predicts the same.

    ``loss + lambda max_{|delta| <= eps} l(f(x), f(x + delta))``, l = KL in both directions, or ``(p - q)^2`` for
    regression (Jiang et al. 2020, equation 1). delta starts normal and takes steps
    ``delta <- clip(delta + step_size g / max |g|, -eps, eps)``, g the gradient of l, max over one instance
    (algorithm 1). The ascent leaves no gradient on the weights; the last pass has a gradient through both predictions.

    Differs from the paper: only this regulariser, without the Bregman proximal point method; and every pass has
    its own dropout masks.

    Args:
        smart_lambda: weight of the term, >= 0; 0 is the loss alone, in one pass. Default 1.
        smart_steps: ascent steps, >= 1. Default 1, as in the authors' code.
        smart_step_size: step along the normalised gradient, >= 0. Default 1e-3, as in the authors' code.
        smart_eps: radius of the ball, largest norm, >= 0. Default 1e-5, the size of the start: most entries of delta
            end at +-eps after a step of the default size.
        smart_init: standard deviation of the start, >= 0. Default 1e-5, as in the authors' code.
    """

    smart_lambda: float = _flag(1.0, "weight of the divergence from the worst pass", minimum=0)
    smart_steps: int = _flag(1, "ascent steps", minimum=1)
    smart_step_size: float = _flag(1e-3, "step along the gradient divided by its largest entry", minimum=0)
    smart_eps: float = _flag(1e-5, "largest entry of the perturbation", minimum=0)
    smart_init: float = _flag(1e-5, "standard deviation of the start", minimum=0)

    @property
    def is_active(self) -> bool:
        """Whether the weight is not 0."""
        return self.smart_lambda > 0

    def __call__(self, loss: Tensor, prediction: Tensor, passes: Passes) -> tuple[Tensor, Tensor]:
        """See `Regularizer`."""
        deltas = self.ascend(prediction.detach(), passes)
        worst = passes.predict(lambda call, _, output: output + deltas[call].to(output.dtype))
        term = self.smart_lambda * passes.divergence(prediction, worst)
        return loss + term, term

    def ascend(self, prediction: Tensor, passes: Passes) -> list[Tensor]:
        """Return the perturbation of each call of a word embedding."""
        deltas: list[Tensor] = []
        masks: list[Tensor] = []

        def perturb(call: int, is_token: Tensor, output: Tensor) -> Tensor:
            if call == len(deltas):
                deltas.append((_empty_like(output).normal_(0.0, self.smart_init) * is_token).requires_grad_())
                masks.append(is_token)
            return output.detach() + deltas[call].to(output.dtype)

        for _ in range(self.smart_steps):
            divergence = passes.divergence(prediction, passes.predict(perturb))
            gradients = torch.autograd.grad(divergence, deltas)
            for call, direction in enumerate(_normalised(gradients)):
                moved = (deltas[call].detach() + self.smart_step_size * direction).clamp(
                    -self.smart_eps, self.smart_eps
                )
                deltas[call] = (moved * masks[call]).requires_grad_()
        return [delta.detach() for delta in deltas]


def _empty_like(output: Tensor) -> Tensor:
    # Half precision would draw other numbers, and could not hold the gradient's direction.
    return torch.empty_like(output, dtype=wide_dtype(output.dtype)).detach()


def _normalised(gradients: tuple[Tensor, ...]) -> list[Tensor]:
    """Divide by the largest entry of each instance, over all calls; no direction where that is 0 or not finite."""
    largest = torch.stack([gradient.abs().flatten(1).amax(1) for gradient in gradients]).amax(0)
    return [torch.nan_to_num(gradient / largest[:, None, None], 0.0, 0.0, 0.0) for gradient in gradients]


REGULARIZERS: dict[str, type[Regularizer]] = {"rdrop": RDrop, "r3f": R3F, "smart": Smart}
