"""``python -m disk_plugin.integrations.timm path/to/train.py ...``: runs timm's own training script with DiSK."""

import argparse
import sys
from pathlib import Path

from disk_plugin.features import METHODS
from disk_plugin.features.launching import import_methods

from . import flags

_COMMAND = "python -m disk_plugin.integrations.timm"
_CONFIGS = Path(__file__).parent
_DESCRIPTION = """\
Train with DiSK by timm's own train.py (timm >= 1.0.27), which is not edited. TRAIN.PY is the script of a git checkout.
Its flags follow, with --kd-model-name for the teacher; the flags below are DiSK's. All can be in the YAML file of -c,
which may be one shipped here: configs/imagenet/r50_r18.yaml, vitl_vitti.yaml, vitl_deitti.yaml.
"""


def main(argv: list[str] | None = None) -> None:
    """Load the script, add DiSK to its namespace, run it."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        METHODS.update(import_methods(_imports(argv), METHODS, flag="--disk-import"))
    except (ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
    if not argv or argv[0].startswith("-"):
        _explain(argv)
        return
    path, *rest = argv
    try:
        from .script import load_script

        train = load_script(path)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    from .teacher_checkpoint import arguments_allowed
    from .training import prepare

    train.parser.prog = f"{_COMMAND} {path}"
    prepare(train)
    sys.argv = [path, *_shipped_configs(rest)]
    with arguments_allowed():
        train.main()


def _explain(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=_COMMAND,
        usage="%(prog)s TRAIN.PY --kd-model-name TEACHER [flags of train.py] [--disk-...]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add(parser)
    if set(argv) & {"-h", "--help"}:
        parser.print_help()
    else:
        parser.error(f"expected the path of timm's train.py first, got {argv[0] if argv else 'nothing'}")


def _imports(argv: list[str]) -> list[str]:
    """Return the modules to import, before the parser has flags for their methods; a ``-c`` file may name some too."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--disk-import", nargs="+", action="extend", default=[])
    parser.add_argument("-c", "--config", default="")
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    path = next((path for path in (Path(known.config), _CONFIGS / known.config) if path.is_file()), None)
    return [*known.disk_import, *([] if path is None else _imports_in(path))]


def _imports_in(path: Path) -> list[str]:
    """Return the modules that a ``-c`` file names; the script itself reports other errors in the file."""
    import yaml  # train.py reads its files with it

    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        return []
    named = content.get("disk_import") if isinstance(content, dict) else None
    return [named] if isinstance(named, str) else list(named or [])


def _shipped_configs(argv: list[str]) -> list[str]:
    """Replace the name of a shipped YAML file by its path."""

    def resolve(name: str) -> str:
        if Path(name).is_file():
            return name
        if not (_CONFIGS / name).is_file():
            shipped = sorted(str(path.relative_to(_CONFIGS)) for path in _CONFIGS.glob("configs/**/*.yaml"))
            sys.exit(f"error: -c must name a YAML file, found none at {name}; shipped are {', '.join(shipped)}")
        return str(_CONFIGS / name)

    resolved = []
    for before, word in zip(["", *argv], argv, strict=False):
        if before in ("-c", "--config"):
            word = resolve(word)
        elif word.startswith("--config="):
            word = "--config=" + resolve(word.removeprefix("--config="))
        resolved.append(word)
    return resolved


if __name__ == "__main__":
    main()
