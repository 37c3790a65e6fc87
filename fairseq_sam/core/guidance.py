"""When to use which method: a line for each preset, for the lists of methods. The cards have the evidence."""

from collections.abc import Mapping

WHEN_TO_USE: Mapping[str, str] = {
    "sam": "to begin with: one number to search, and what every other method is compared with",
    "asam": "layers that can be rescaled against each other, as around ReLU: its sharpness does not change with them",
    "layer_sam": "layers whose weights and gradients differ by orders of magnitude, as with large batches",
    "multistep_defense": "translation and language models from scratch; Transformers from a late start epoch on",
    "ga_sam": "text models from scratch, CNN, LSTM or Transformer, whose layers have gradients of different strength",
    "efficient_sam": "fine-tuning of large models, where SAM is too slow; its paper gains most on limited data",
    "msam": "a few large batches on one device, perturbed as differently as on many workers",
    "fisher_sam": "fine-tuning of pretrained models, most of all on limited data: nine weights in ten stay in place",
    "esam": "to save a part of SAM's second pass, with a criterion that says the losses of single instances",
    "gsam": "schedules whose learning rate changes a lot, which the radius then follows",
    "delta_sam": "fine-tuning on small data, where a few instances are sharper than the rest; in full precision or AMP",
    "instance_sam": "to judge delta_sam on small data; too slow for anything else",
    "random_sam": "as a control: whether the gradient's direction matters, or any noise of its length would do",
    "model_perturbation": "where the perturbation shall fade as the gradient does, late in training",
    "awp": "layers of very different size that shall all be perturbed in proportion",
    "look_sam": "to come close to SAM at 1.2 passes, where three more copies of the weights fit into memory",
    "freelb": "fine-tuning and translation: robust to changes of what the model reads, in place of its weights",
}
