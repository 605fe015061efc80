"""A checkout of the host and its device, set up before the host is imported."""

import getpass
import importlib
import os
import sys
import traceback
import types
from pathlib import Path

import torch

GET_HOST = "git clone https://github.com/megvii-research/mdistiller"
_NEEDED = (
    "{script}",
    "mdistiller/distillers/__init__.py",
    "mdistiller/engine/trainer.py",
    "mdistiller/engine/cfg.py",
)


_PACKAGES = ("mdistiller", "numpy", "PIL", "scipy", "tensorboardX", "torchvision", "tqdm", "yacs")  # of our extra
# imported by logit-standardization-KD's MLKD and not used: absent where Python has no Tk, and on Windows
_UNUSED = {
    "tkinter": ("turtle", "st"),
    "_tkinter": ("turtle", "st"),
    "turtle": ("turtle", "st"),
    "termios": ("termios", "CEOL"),
}
_CALLED = ("BaseTrainer", "adjust_learning_rate", "save_checkpoint", "load_checkpoint")


def import_host() -> None:
    """Import the host's distillers and trainers.

    Raises:
        ImportError: they cannot be; the message says why, and how to get what is missing.
    """
    try:
        _import()
        trainer = importlib.import_module("mdistiller.engine.trainer")
    except Exception as error:  # a fork's modules may raise anything
        said = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ImportError(f"mdistiller cannot be imported ({said}): {_advice(error)}") from error
    lacking = [name for name in _CALLED if not hasattr(trainer, name)]
    if lacking:
        raise ImportError(
            f"mdistiller/engine/trainer.py must have {', '.join(_CALLED)}; this checkout's lacks {lacking}"
        )


def _advice(error: Exception) -> str:
    if not isinstance(error, ImportError):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"the checkout's own code fails at {frame.filename}:{frame.lineno}"
    missing = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing and missing not in _PACKAGES:
        return f"this checkout needs the package {missing}"
    return (
        "put a checkout of https://github.com/megvii-research/mdistiller on sys.path (its root, not tools/) and pip "
        'install "disk-plugin[mdistiller]"'
    )


def _import() -> None:
    for _ in range(3):
        try:
            for name in ("distillers", "engine", "models", "dataset"):
                importlib.import_module(f"mdistiller.{name}")
        except ModuleNotFoundError as error:
            if error.name not in _UNUSED:
                raise
            name, value = _UNUSED[error.name]
            sys.modules[name] = types.ModuleType(name)
            setattr(sys.modules[name], value, None)
        else:
            return
    raise ImportError("its imports fail")


def open_checkout(folder: str | None, script: str = "tools/train.py") -> Path:
    """Put the checkout on ``sys.path`` and return it.

    Raises:
        ValueError: not a checkout; the message says what one contains and how to get it.
    """
    if not folder:
        raise ValueError(f"--host must name a checkout of mdistiller, got none; to get one: {GET_HOST}")
    root = Path(folder).expanduser().resolve()
    needed = [name.format(script=script) for name in _NEEDED[script == "plain" :]]
    missing = [name for name in needed if not (root / name).is_file()]
    if missing:
        raise ValueError(
            f"--host must name a checkout of mdistiller, which contains {', '.join(needed)}; {root} lacks "
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
