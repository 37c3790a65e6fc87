"""What half precision puts between the trainer and our optimizer: loss scalers, masters in single precision."""

from collections.abc import Sequence
from typing import Any

from fairseq.optim import FP16Optimizer
from torch import Tensor


def wrappers(optimizer: Any) -> list[Any]:
    """The trainer's optimizer and those inside it, outermost first."""
    chain = []
    while optimizer is not None:
        chain.append(optimizer)
        inner = (vars(optimizer).get(name) for name in ("fp32_optimizer", "wrapped_optimizer", "_optimizer"))
        optimizer = next((candidate for candidate in inner if candidate is not None), None)
    return chain


def scaler_of(optimizer: Any) -> Any:
    """What scales the loss, None if nothing does."""
    scalers = (vars(wrapper).get("scaler", vars(wrapper).get("_grad_scaler")) for wrapper in wrappers(optimizer))
    return next((scaler for scaler in scalers if scaler is not None), None)


def loss_scale(optimizer: Any) -> float:
    """By what ``optimizer.backward`` multiplies the loss."""
    scaler = scaler_of(optimizer)
    if scaler is None:
        return 1.0
    return float(scaler.get_scale() if hasattr(scaler, "get_scale") else scaler.loss_scale)


def master_weights(optimizer: Any, tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """fp32 masters of half-precision parameters, in their order and shapes; None where there are none."""
    holder = next((wrapper for wrapper in wrappers(optimizer) if isinstance(wrapper, FP16Optimizer)), None)
    if holder is None:
        return None
    if not holder.has_flat_params:
        by_parameter = {id(p): p32 for p, p32 in zip(holder.fp16_params, holder.fp32_params, strict=True)}
        return [by_parameter[id(tensor)].data for tensor in tensors]
    views: dict[int, Tensor] = {}
    for device, flat in holder.fp32_params.items():
        offset = 0
        for p in holder.fp16_params:
            if len(holder.fp32_params) == 1 or p.device.index == device:
                views[id(p)] = flat.data[offset : offset + p.numel()].view_as(p)
                offset += p.numel()
    return [views[id(tensor)] for tensor in tensors]
