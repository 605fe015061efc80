"""A checkout of the host and its device, set up before the host is imported."""

import getpass
import os
import sys
from pathlib import Path

import torch

GET_HOST = "git clone https://github.com/megvii-research/mdistiller"
_NEEDED = (
    "tools/train.py",
    "mdistiller/distillers/__init__.py",
    "mdistiller/engine/trainer.py",
    "mdistiller/engine/cfg.py",
)


def open_checkout(folder: str | None) -> Path:
    """Put the checkout on ``sys.path`` and return it.

    Raises:
        ValueError: not a checkout; the message says what one contains and how to get it.
    """
    if not folder:
        raise ValueError(f"--host must name a checkout of mdistiller, got none; to get one: {GET_HOST}")
    root = Path(folder).expanduser().resolve()
    missing = [name for name in _NEEDED if not (root / name).is_file()]
    if missing:
        raise ValueError(
            f"--host must name a checkout of mdistiller, which contains {', '.join(_NEEDED)}; {root} lacks "
            f"{', '.join(missing)}; to get one: {GET_HOST}"
        )
    sys.dont_write_bytecode = True  # leave no files in the checkout
    sys.path.insert(0, str(root))
    try:
        getpass.getuser()  # the host asks for a user name, without using it
    except (KeyError, OSError):
        os.environ["USER"] = "user"
    return root


def use_device(device: str) -> None:
    """Make the host, which calls ``.cuda()`` everywhere, run on the CPU, or check that there is a CUDA device.

    Raises:
        ValueError: ``device`` is ``"cuda"`` and there is none.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda needs a CUDA device, found none; to run on the CPU: --device cpu")
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else DataParallel finds the devices by itself
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
