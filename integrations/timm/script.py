"""Finds, checks and loads a timm ``train.py``, with the timm it was written for."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .version import require_timm

# what the launcher replaces or reads in the script's namespace
_SINCE_TASKS = {"LogitDistillationTask", "resume_task_checkpoint"}
_NEEDED = {"parser", "main", "_parse_args", "train_one_epoch"} | _SINCE_TASKS
_QUOTES = " '\"\n"


def load_script(path: str) -> ModuleType:
    """Import the script as ``train``, with the timm beside it first on the path, as ``python train.py`` would.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a train.py of timm; raised before any of it runs.
        ImportError: timm is absent or too old.
    """
    script = Path(path).expanduser().resolve()
    if not script.is_file():
        raise FileNotFoundError(f"expected the path of timm's train.py, found no file {script}")
    _check(script)
    beside = script.parent / "timm" / "__init__.py"
    if "timm" in sys.modules and beside.is_file() and sys.modules["timm"].__file__ != str(beside):
        raise ImportError(f"{script} needs the timm beside it, but {sys.modules['timm'].__file__} is already imported")
    sys.path.insert(0, str(script.parent))
    require_timm()
    spec = importlib.util.spec_from_file_location("train", script)
    if spec is None or spec.loader is None:
        raise ImportError(f"expected a Python script that can be imported, got {script}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module  # the name that worker processes look up
    spec.loader.exec_module(module)
    return module


def _check(script: Path) -> None:
    try:
        tree = ast.parse(script.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{script} must be timm's train.py, but it is not Python: {error}") from error
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    missing = _NEEDED - found
    if not missing:
        return
    if missing <= _SINCE_TASKS:
        version = script.parent / "timm" / "version.py"
        known = f" (timm {version.read_text().split('=')[-1].strip(_QUOTES)})" if version.is_file() else ""
        raise ValueError(f"DiSK needs the train.py of timm >= 1.0.27, got {script}{known}, without {sorted(missing)}")
    raise ValueError(f"{script} must be timm's train.py, but it lacks {sorted(missing)}")
