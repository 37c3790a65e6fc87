"""Images and labels in MNIST's own format (idx, unsigned bytes), packed by gzip or not."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

CLASSES = 10
FILES = ("images-idx3-ubyte", "labels-idx1-ubyte")


def read_mnist(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read a split of MNIST, or of data in its format.

    Args:
        folder: with ``train-images-idx3-ubyte`` and its like, ``.gz`` behind the names or not.
        split: ``train`` or ``t10k``.

    Returns:
        Pixels from 0 to 255, ``(N, height * width)``, and classes from 0 to 9, ``(N,)``, both as unsigned bytes.

    Raises:
        ValueError: if the folder or a file is not there, cut off, or not what it should be.
    """
    if not folder.is_dir():
        raise ValueError(f"MNIST must be a folder with {split}-{FILES[0]}.gz and so on; {folder} is none")
    images, labels = (_read_idx(folder, f"{split}-{name}") for name in FILES)
    if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
        shapes = " and ".join(str(tuple(found.shape)) for found in (images, labels))
        raise ValueError(f"expected (N, height, width) images and N labels of {split} in {folder}, got {shapes}")
    if len(labels) and int(labels.max()) >= CLASSES:
        raise ValueError(f"expected labels from 0 to {CLASSES - 1} of {split} in {folder}, got {int(labels.max())}")
    return images.flatten(1), labels


def _read_idx(folder: Path, name: str) -> Tensor:
    path = folder / f"{name}.gz"
    if not path.exists():
        path = folder / name
    if not path.is_file():
        raise ValueError(f"MNIST must hold {name}.gz or {name}; {folder} has neither")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is cut off or no gzip file ({error}); get it again") from error
    return _tensor_of(content, path)


def _tensor_of(content: bytes, path: Path) -> Tensor:
    """The format: two zero bytes, 8 for unsigned bytes, the number of axes, their lengths, the values."""
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"expected a file of MNIST's format (idx, unsigned bytes), got {path}")
    begin = 4 + 4 * content[3]
    if len(content) < begin:
        raise ValueError(f"{path} is cut off within its head; get it again")
    shape = struct.unpack(f">{content[3]}I", content[4:begin])
    if len(content) - begin != math.prod(shape):
        raise ValueError(f"expected {math.prod(shape)} values {shape} in {path}, got {len(content) - begin}")
    if not math.prod(shape):
        return torch.zeros(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content[begin:]), dtype=torch.uint8).reshape(shape)
