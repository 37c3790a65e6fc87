"""Small files in MNIST's format: four by four pixels, classes that the pixels tell."""

import gzip
import struct

import numpy as np

SIDE = 4
SIZES = {"train": 24, "t10k": 20}


def idx(array, kind=8):
    """The bytes of an idx file, after the format's description."""
    return struct.pack(">HBB", 0, kind, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, seed=0, sizes=SIZES, packed=True):
    """Write both splits; returns images ``(N, 4, 4)`` and labels by split."""
    folder.mkdir(parents=True, exist_ok=True)
    random, made = np.random.default_rng(seed), {}
    for split, number in sizes.items():
        labels = random.integers(0, 3, number).astype(np.uint8)
        images = random.integers(0, 120, (number, SIDE, SIDE)).astype(np.uint8)
        images[np.arange(number), labels] += 100  # a bright row
        made[split] = images, labels
        for array, name in ((images, "images-idx3-ubyte"), (labels, "labels-idx1-ubyte")):
            path = folder / f"{split}-{name}{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return made
