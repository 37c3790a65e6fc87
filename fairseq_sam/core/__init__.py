"""The engine in plain PyTorch: methods, scales, the ascent and the step. Never imports fairseq."""

from fairseq_sam.core.batch import InstanceBatch
from fairseq_sam.core.embeddings import WordEmbeddings
from fairseq_sam.core.method import PRESETS, Method
from fairseq_sam.core.sharpness_aware import SharpnessAware
from fairseq_sam.core.space import ParameterSpace
from fairseq_sam.core.step import SharpnessAwareStep

__all__ = [
    "PRESETS",
    "InstanceBatch",
    "Method",
    "ParameterSpace",
    "SharpnessAware",
    "SharpnessAwareStep",
    "WordEmbeddings",
]
