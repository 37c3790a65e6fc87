"""Measurements on a trained model: plain functions of a model, batches and a loss. Never imports fairseq."""

from fairseq_sam.analysis.sharpness import Sharpness, ascent_sharpness

__all__ = ["Sharpness", "ascent_sharpness"]
