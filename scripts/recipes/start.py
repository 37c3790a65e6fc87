"""Let a run begin with the epochs that it shares with the baseline: before ``--sam-start-epoch`` they are the same.

``python -m scripts.recipes.start FROM TO OPTIMIZER`` copies the last checkpoint and the log of the run FROM into TO,
where fairseq-train goes on with another optimizer. fairseq compares the optimizers' names, so the copy has the new
one's; the state is that of the base optimizer in both.
"""

import argparse
import shutil
from pathlib import Path

import torch

CHECKPOINT = "checkpoint_last.pt"
LOG = "train.log"


def begin_from(source: Path, target: Path, optimizer: str) -> None:
    """Copy checkpoint and log, unless the target has a checkpoint.

    Args:
        source: folder of a run of the base optimizer.
        target: folder of a run that shall go on from its end.
        optimizer: name of the target's optimizer, as on the command line.

    Raises:
        ValueError: if the source's last checkpoint is of another optimizer than a plain one or the target's.
    """
    if (target / CHECKPOINT).exists():
        return
    from fairseq.optim import OPTIMIZER_REGISTRY

    import fairseq_sam  # noqa: F401  registers the optimizers, allows the checkpoints' classes

    state = torch.load(source / CHECKPOINT, map_location="cpu")
    last = state["optimizer_history"][-1]
    plain = {cls.__name__ for cls in OPTIMIZER_REGISTRY.values() if not hasattr(cls, "preset")}
    wrappers = {"FP16Optimizer", "MemoryEfficientFP16Optimizer", "AMPOptimizer"}  # hide whose state they hold
    if last["optimizer_name"] in plain:
        last["optimizer_name"] = OPTIMIZER_REGISTRY[optimizer].__name__
    elif last["optimizer_name"] not in wrappers:
        raise ValueError(f"{source / CHECKPOINT} is of {last['optimizer_name']}, expected a plain optimizer")
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / LOG, target / LOG)
    torch.save(state, target / f"{CHECKPOINT}.part")
    (target / f"{CHECKPOINT}.part").replace(target / CHECKPOINT)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the base optimizer's run")
    parser.add_argument("target", type=Path, help="folder of the run that begins with it")
    parser.add_argument("optimizer", help="name of its optimizer")
    args = parser.parse_args()
    begin_from(args.source, args.target, args.optimizer)


if __name__ == "__main__":
    main()
