"""Sharpness-aware training for fairseq, and for any PyTorch loop.

``fairseq-train … --user-dir fairseq_sam --optimizer ga_sam`` registers, on every base optimizer of fairseq:

======================  ============================================================================================
``sam``                 Sharpness-Aware Minimization (Foret et al. 2021)
``asam``                Adaptive SAM: perturbations proportional to each weight (Kwon et al. 2021)
``layer_sam``           layer-wise SAM: perturbations proportional to ``||w_i|| / ||g_i||`` (Liu et al. 2021)
``multistep_defense``   multi-step adversarial parameter defense, averaged loss (Zhang et al. 2021)
``ga_sam``              Gradient-Strength based Adaptive SAM, averaged loss (Zhang et al. 2022)
``efficient_sam``       SAM with the ascent on a quarter of the batch (Bahri et al. 2022)
``msam``                SAM on m disjoint parts of the batch, each with its own perturbation (Foret et al. 2021)
``fisher_sam``          SAM that perturbs the weights with the largest Fisher information (Zhong et al. 2022)
``esam``                Efficient SAM: random tensors perturbed, last pass on selected instances (Du et al. 2022)
``gsam``                surrogate Gap guided SAM, radius follows the learning rate (Zhuang et al. 2022)
``delta_sam``           SAM with dynamic reweighting of the instances, delta-SAM (Zhou et al. 2022)
``instance_sam``        a perturbation for every instance: delta-SAM's costly reference (Zhou et al. 2022)
``random_sam``          a Gaussian direction in place of the gradient: average-direction sharpness (Wen et al. 2023)
``model_perturbation``  Adversarial Model Perturbation: ascent by gradient steps of fixed rate (Zheng et al. 2021)
``awp``                 Adversarial Weight Perturbation: each layer normalised on its own (Wu et al. 2020)
``look_sam``            LookSAM: SAM every n-th update, its sharpness component between (Liu et al. 2022)
``freelb``              FreeLB: attack on the word embeddings, averaged loss (Zhu et al. 2020)
======================  ============================================================================================

Without fairseq, ``fairseq_sam.SharpnessAware`` gives the same methods to a plain PyTorch loop.
"""

import importlib.util

from fairseq_sam._quiet import quiet_imports
from fairseq_sam._version import __version__
from fairseq_sam.core import PRESETS, InstanceBatch, Method, SharpnessAware, WordEmbeddings

__all__ = ["PRESETS", "InstanceBatch", "Method", "SharpnessAware", "WordEmbeddings", "__version__"]

if importlib.util.find_spec("fairseq") is not None:
    with quiet_imports():
        import fairseq_sam.adapter

        # fairseq imports these itself, but not if the package was imported before it reads --user-dir.
        import fairseq_sam.models.bert
        import fairseq_sam.models.textcnn
        import fairseq_sam.tasks.sentence_embedding
        import fairseq_sam.tasks.span_prediction  # noqa: F401
