#!/usr/bin/env python3
"""Average the weights of checkpoints, with the flags of fairseq's own script, which the package leaves out.

Examples:
    average_checkpoints.py --inputs SAVE_DIR --num-epoch-checkpoints 10 --output SAVE_DIR/averaged.pt
    average_checkpoints.py --inputs a.pt b.pt --output averaged.pt
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", required=True, nargs="+", type=Path, help="checkpoint files, or one --save-dir")
    parser.add_argument("--output", required=True, type=Path, help="checkpoint to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--num-epoch-checkpoints", type=int, help="average the last N checkpoint<epoch>.pt of the folder"
    )
    which.add_argument("--num-update-checkpoints", type=int, help="… the last N checkpoint_<epoch>_<update>.pt")
    parser.add_argument("--checkpoint-upper-bound", type=int, help="highest epoch (or update) to take")
    args = parser.parse_args()

    import pickle

    import torch

    from fairseq_sam.adapter.checkpoints import average_weights, last_checkpoints

    count = args.num_epoch_checkpoints if args.num_epoch_checkpoints is not None else args.num_update_checkpoints
    try:
        if count is None:
            if args.checkpoint_upper_bound is not None:
                parser.error("--checkpoint-upper-bound needs --num-epoch-checkpoints or --num-update-checkpoints")
            paths = args.inputs
            if any(path.is_dir() for path in paths):
                parser.error(
                    "--inputs is a folder: say how many with --num-epoch-checkpoints or --num-update-checkpoints"
                )
        elif len(args.inputs) == 1 and args.inputs[0].is_dir():
            paths = last_checkpoints(
                args.inputs[0],
                count,
                by_update=args.num_update_checkpoints is not None,
                upper_bound=args.checkpoint_upper_bound,
            )
        else:
            paths_given = ", ".join(map(str, args.inputs))
            parser.error(f"with a number of checkpoints, --inputs must be one folder that is there, got {paths_given}")
        state = average_weights(paths)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        if args.output.is_dir():
            raise ValueError(f"--output must be a file, got {args.output}, which is a folder")
    except (ValueError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise SystemExit(f"error: {error}") from error
    torch.save(state, args.output)
    print(f"averaged {len(paths)} checkpoints into {args.output}: " + ", ".join(path.name for path in paths))


if __name__ == "__main__":
    main()
