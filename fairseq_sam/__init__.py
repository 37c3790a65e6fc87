"""Sharpness-aware training for fairseq, and for any PyTorch loop.

``fairseq-train … --user-dir fairseq_sam --optimizer ga_sam`` registers, on every base optimizer of fairseq:

====================  ===========================================================================================
``sam``               Sharpness-Aware Minimization (Foret et al. 2021)
``asam``              Adaptive SAM: perturbations proportional to each weight (Kwon et al. 2021)
``layer_sam``         layer-wise SAM: perturbations proportional to ``||w_i|| / ||g_i||`` (Liu et al. 2021)
``multistep_defense`` multi-step adversarial parameter defense, averaged loss (Zhang et al. 2021)
``ga_sam``            Gradient-Strength based Adaptive SAM, averaged loss (Zhang et al. 2022)
====================  ===========================================================================================

Without fairseq, ``fairseq_sam.SharpnessAware`` gives the same methods to a plain PyTorch loop.
"""

import importlib.util

from fairseq_sam._version import __version__
from fairseq_sam.core import PRESETS, Method, SharpnessAware

__all__ = ["PRESETS", "Method", "SharpnessAware", "__version__"]

if importlib.util.find_spec("fairseq") is not None:
    import fairseq_sam.adapter  # noqa: F401  registers the optimizers, wraps the training step
