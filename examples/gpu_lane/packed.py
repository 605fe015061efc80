"""CIFAR-100 in a fifth of its size, for a machine to which little can be carried: JPEG without colour subsampling.

A split's images are tiles of one large picture. Tiles are four by four of JPEG's blocks, so that no image leaks into
its neighbours. This loses a little of each image; results on a packed file say so.

Usage: python -m gpu_lane.packed DATA TARGET [--quality 92]
"""

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from small_images import data

_TILES, _SIZE = 100, 32  # tiles in a row of the picture; pixels of a tile


def write(source: Path, target: Path, quality: int = 92) -> None:
    """Pack ``source``, which ``data.load`` reads, into ``target``, an ``.npz``."""
    held: dict[str, np.ndarray] = {"quality": np.array(quality)}
    for name, split in zip(("train", "test"), data.load(source), strict=True):
        held[f"{name}_jpeg"] = np.frombuffer(_picture(split.images, quality), np.uint8)
        held[f"{name}_labels"] = split.labels.numpy().astype(np.uint8)
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(target, **held)


def is_packed(path: Path) -> bool:
    """Whether the file is one of :func:`write`'s."""
    if path.suffix != ".npz" or not path.is_file():
        return False
    with np.load(path) as held:
        return "train_jpeg" in held


def read(path: Path) -> tuple[tuple[data.Split, data.Split], str]:
    """Return training and test split, and what they are."""
    with np.load(path) as held:
        train, test = (
            data.Split(_tiles(held[f"{name}_jpeg"].tobytes(), len(held[f"{name}_labels"])), _labels(held, name))
            for name in ("train", "test")
        )
        return (train, test), f"CIFAR-100 as JPEG of quality {int(held['quality'])}"


def _labels(held, name: str) -> torch.Tensor:
    return torch.from_numpy(held[f"{name}_labels"].astype(np.int64))


def _picture(images: torch.Tensor, quality: int) -> bytes:
    count = len(images)
    rows = -(-count // _TILES)
    tiles = torch.zeros(rows * _TILES, 3, _SIZE, _SIZE, dtype=torch.uint8)
    tiles[:count] = images
    picture = tiles.view(rows, _TILES, 3, _SIZE, _SIZE).permute(0, 3, 1, 4, 2).reshape(rows * _SIZE, _TILES * _SIZE, 3)
    file = io.BytesIO()
    Image.fromarray(picture.numpy()).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def _tiles(content: bytes, count: int) -> torch.Tensor:
    picture = torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB")))
    rows = picture.shape[0] // _SIZE
    tiles = picture.view(rows, _SIZE, _TILES, _SIZE, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, _SIZE, _SIZE)[:count].contiguous()


def main() -> None:
    """Pack a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--quality", type=int, default=92)
    args = parser.parse_args()
    write(args.data, args.target, args.quality)
    print(f"{args.target}: {args.target.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
