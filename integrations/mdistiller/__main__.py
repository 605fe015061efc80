"""``python -m disk_plugin.integrations.mdistiller``: runs the host's own ``tools/train.py`` with DiSK registered."""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

from disk_plugin.features import METHODS
from disk_plugin.features.launching import import_methods

from . import checkout, register

_CONFIGS = Path(__file__).parent
_EPILOG = """\
KEY VALUE pairs override the YAML file, as in the host: SOLVER.EPOCHS 100 DISK.VARIANT official_cifar. A run is written
to LOG.PREFIX/EXPERIMENT.PROJECT/NAME-HASH. HASH is that of the settings that define the run, which are in settings.yaml
there: the whole configuration except LOG, names, workers and the test's batch size, and fingerprints of data and
weights. Resuming needs the same flags as the run itself, evaluating the same settings."""


def main(argv: list[str] | None = None) -> None:
    """Prepare the host, then run its script or evaluate a checkpoint."""
    args, unknown = _parser().parse_known_intermixed_args(argv)
    if unknown:
        sys.exit(
            f"error: unknown {unknown[0]}: --help lists the flags; what a flag of the checkout's own script sets is "
            f"set by its key here, such as EXPERIMENT.LOGIT_STAND True instead of --logit-stand"
        )
    with tempfile.TemporaryDirectory() as scratch:
        try:
            cfg, folder = _prepare(args, Path(scratch))
            if args.evaluate is not None:
                _evaluate(args, cfg, folder)
                return
        except (ValueError, TypeError, OSError, ImportError) as error:
            sys.exit(f"error: {error}")
        if cfg.SOLVER.SEED is not None:
            from .seeds import seed_everything

            seed_everything(cfg.SOLVER.SEED)  # for the initial weights; each epoch is seeded again
        print(f"experiment folder: {folder.path}")  # noqa: T201
        from .script import ScriptError, run_script

        root = Path(args.host).expanduser().resolve()
        try:
            run_script(root, args.script, Path(scratch, "config.yaml"), folder.path, resume=args.resume)
        except ScriptError as error:
            folder.abandon()
            sys.exit(f"error: {error}")
        finally:
            _tell(folder.finalize())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m disk_plugin.integrations.mdistiller",
        description="Train with DiSK, other methods alone or guided by it, or any of mdistiller's own distillers, "
        "by its tools/train.py.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--host", metavar="DIR", help="a checkout of mdistiller, the folder that contains tools/ and mdistiller/")
    names = ", ".join(f"{name.upper()}, DISK_{name.upper()}" for name in METHODS)
    add(
        "--script",
        metavar="FILE",
        default="tools/train.py",
        help="the checkout's script that trains; 'plain' for the steps of the original one, where a fork's takes only "
        "its own distillers (default: %(default)s)",
    )
    add("--distiller", metavar="NAME", help=f"DISK, {names}, KD, ...; over the YAML's DISTILLER.TYPE")
    add(
        "--import",
        dest="imports",
        metavar="MODULE",
        action="append",
        default=[],
        help="import a module of your own first: its methods become NAME and DISK_NAME, and its dicts MODELS "
        "(constructors that take num_classes) and DATASETS (functions of the configuration that return what the host's "
        "get_dataset does) join the host's; may be given several times",
    )
    add(
        "--cfg",
        metavar="FILE",
        help="YAML file: a path, one in the checkout, or one shipped here (configs/cifar100/disk/...)",
    )
    add("--resume", action="store_true", help="resume from the experiment's latest checkpoint")
    add(
        "--overwrite",
        action="store_true",
        help="replace an earlier run, which is deleted once the new one has a checkpoint",
    )
    add(
        "--allow-changed-settings",
        action="store_true",
        help="let --resume continue a copy of the run that differs least, in a new folder; rates, weights and "
        "schedules may differ, but not the seed nor what the checkpoint depends on",
    )
    add(
        "--from",
        dest="chosen",
        metavar="FOLDER",
        help="the run to --resume, if several are equally near: its folder or the folder's name",
    )
    add("--evaluate", metavar="WHAT", help="validate a checkpoint: best or latest of the experiment, or a file")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="where to run (default: %(default)s)")
    add(
        "--data-root",
        metavar="DIR",
        help="folder that holds cifar-100-python/ (official or not: no md5 is asked for), or "
        "ImageNet's or Tiny-ImageNet's train/ and val/; default: data/ in the checkout, downloaded by the host",
    )
    add(
        "--teacher-checkpoint",
        metavar="FILE",
        help="the teacher's weights, {'model': state dict} or a bare state dict; "
        "default: the host's own in its download_ckpts/",
    )
    add(
        "--trust-checkpoint",
        action="store_true",
        help="load the teacher's checkpoint even if it holds arbitrary objects, "
        "which can run code: only if you trust its source",
    )
    add(
        "--seed",
        type=int,
        metavar="N",
        help="seed initial weights and every epoch with N: process, loader, workers; with one seed every distiller and "
        "trainer sees the same batches (default: unseeded, as the host)",
    )
    add("options", nargs="*", metavar="KEY VALUE", help="options of the configuration")
    return parser


def _prepare(args: argparse.Namespace, scratch: Path) -> tuple[Any, Any]:
    """Do all that precedes the host's script, so that errors come before anything is written."""
    if args.resume + args.overwrite + (args.evaluate is not None) > 1:
        raise ValueError("--resume goes on with a run, --overwrite deletes it, --evaluate reads it: give one of them")
    if not args.resume and (args.allow_changed_settings or args.chosen is not None):
        raise ValueError("--allow-changed-settings and --from say how to go on with a run: give --resume too")
    root = checkout.open_checkout(args.host, args.script)
    imported = import_methods(args.imports, METHODS, flag="--import")
    if imported:
        from .config import check_imported

        check_imported({name: kind for name, kind in imported.items() if name not in METHODS})
    METHODS.update(imported)
    register()
    from . import budget, host, loaders, own, settings
    from .folder import Folder
    from .script import PLAIN, check_script

    if args.script != PLAIN and args.evaluate is None:
        check_script(root / args.script)

    checkout.use_device(args.device)
    cfg = settings.merge(_config_file(args.cfg, root), args.options, distiller=args.distiller, seed=args.seed)
    own.add_models(cfg, own.collected(args.imports, "MODELS"))
    settings.check_names(cfg, host.models(cfg))
    if args.teacher_checkpoint is not None and cfg.DISTILLER.TYPE == "NONE":
        raise ValueError("--teacher-checkpoint needs a distiller with a teacher, got NONE")
    is_own = own.add_datasets(cfg, own.collected(args.imports, "DATASETS"), args.data_root)
    host.use_data(cfg, None if is_own else args.data_root)
    if args.evaluate in ("best", "latest"):
        folder = Folder(cfg, settings.get_settings(cfg, data="", teacher="", warm_start=""))
        folder.find()
        return cfg, folder
    if args.evaluate is not None:
        return cfg, None
    wandb = importlib.util.find_spec("wandb")
    if cfg.LOG.WANDB and (wandb is None or wandb.origin is None):  # no origin: a folder of logs
        raise ValueError("LOG.WANDB True needs wandb: pip install wandb, or set LOG.WANDB False")
    teacher = host.use_teacher(cfg, args.teacher_checkpoint, scratch, trust=args.trust_checkpoint)
    data = loaders.described(cfg) if is_own else host.fingerprint_data(cfg, args.data_root)
    defining = settings.get_settings(cfg, data=data, teacher=teacher, warm_start=host.check_warm_start(cfg))
    folder, estimates = Folder(cfg, defining), cfg.DISK.BUDGET == budget.ESTIMATE
    if estimates:
        budget.check_estimate(cfg)
        cfg.DISK.BUDGET, how = (0.0, "") if args.resume else budget.estimated(cfg)
    notes = host.validate(cfg)
    if args.resume:
        notes += folder.resume(chosen=args.chosen, allow_changed_settings=args.allow_changed_settings)
    else:
        folder.start(overwrite=args.overwrite)
    if estimates and args.resume:
        cfg.DISK.BUDGET = budget.recorded(folder.path)
    elif estimates:
        budget.record(folder.path, cfg.DISK.BUDGET, how)
        notes += [how]
    _tell(notes)
    settings.dump(cfg, folder.path.name, scratch / "config.yaml")
    return cfg, folder


def _tell(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}")  # noqa: T201


def _config_file(given: str | None, root: Path) -> Path:
    if not given:
        raise ValueError("--cfg must name a YAML file, got none")
    places = [Path(given), root / given, _CONFIGS / given]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"--cfg must name a YAML file, found none at {', '.join(map(str, places))}")


def _evaluate(args: argparse.Namespace, cfg: Any, folder: Any) -> None:
    from .evaluate import checkpoint_path, evaluate

    path = checkpoint_path(cfg, args.evaluate, None if folder is None else folder.path)
    top1, top5, loss = evaluate(cfg, path)
    print(f"{path}: top-1 {top1:.2f}, top-5 {top5:.2f}, cross-entropy {loss:.4f}")  # noqa: T201


if __name__ == "__main__":
    main()
