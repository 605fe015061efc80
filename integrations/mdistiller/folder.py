"""An experiment's folder: finds it, protects it from overwriting, and resumes it only with the same settings."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml
from yacs.config import CfgNode

from disk_plugin.features import METHODS

from .runs import CHECKPOINT, SETTINGS, Run, defining, describe, lasts, nearest, read_runs, write_settings
from .settings import Settings, is_guided

_GIVEN = ("data", "teacher weights", "DISTILLER.WARM_START")  # files, compared by content
_CHANGES = "changed_settings.txt"


def _not_copied() -> Callable[..., set[str]]:
    """Return the ``ignore`` of ``copytree``: snapshots of past epochs are not copied."""
    snapshots = [f"{name}_[0-9]*" for name in ("epoch", "student", *METHODS)]
    return shutil.ignore_patterns(*snapshots, f"{SETTINGS}*")


class Folder:
    """The folder of an experiment's checkpoints and logs: LOG.PREFIX/EXPERIMENT.PROJECT/NAME-HASH.

    The host puts every option into the folder's name, so ``--resume`` does not find a run whose options changed. Here
    the name is the experiment's with a short hash of the settings that define it, which are stored inside.
    """

    def __init__(self, cfg: CfgNode, settings: Settings) -> None:
        self.settings, self._guided = settings, is_guided(cfg)
        self._parent = Path(cfg.LOG.PREFIX, cfg.EXPERIMENT.PROJECT)
        self._name = (cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG).replace(os.sep, "_")
        canonical = yaml.safe_dump(defining(settings), sort_keys=True)
        self.path = self._parent / f"{self._name}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"
        self._aside = self.path.with_name(f"{self.path.name}.overwritten")
        self._new = False
        self._copied: tuple[Path, tuple[int, int]] | None = None  # source folder, stamp of the copied checkpoint

    def start(self, *, overwrite: bool) -> None:
        """Start a run; with ``overwrite``, an earlier one is moved aside until ``finalize``.

        Raises:
            FileExistsError: the folder, or one beside it, holds an earlier run, and ``overwrite`` is not set.
        """
        earlier = self._earlier()
        if overwrite:
            self._set_aside(earlier)
        else:
            self._finish_overwrite()
        if earlier is not None and not overwrite:
            seed = self.settings.get("SOLVER.SEED")
            raise FileExistsError(
                f"{earlier} holds an earlier run with these settings: go on with it by --resume, delete it and start "
                f"anew by --overwrite, or repeat it beside the first by "
                f"{'--seed N (it has no seed)' if seed is None else f'another --seed than {seed}'}"
            )
        self._new = not self.path.exists()
        write_settings(self.path, self.settings)

    def abandon(self) -> None:
        """Delete the folder of a run that was started here and came to no training."""
        if self._new and not (self.path / CHECKPOINT).exists():
            shutil.rmtree(self.path)

    def finalize(self) -> list[str]:
        """Finalize (commit or roll back): delete the overwritten run, or undo a start without a checkpoint.

        Returns:
            Notes for the user.
        """
        if self._copied is not None:
            original, checkpoint = self._copied
            if not (self.path / CHECKPOINT).is_file() or _stamp(self.path) != checkpoint:
                return []
            shutil.rmtree(self.path)
            return [f"no epoch was trained under the changed settings: {self.path} is gone, {original} as it was"]
        if not self._aside.exists():
            return []
        if (self.path / CHECKPOINT).is_file():
            shutil.rmtree(self._aside)
            return []
        self._clear_path()
        self._aside.rename(self.path)
        return [f"the new run came to no checkpoint: {self.path} holds the earlier one again"]

    def resume(self, *, chosen: str | None, allow_changed_settings: bool) -> list[str]:
        """Select the run with these settings or, with ``allow_changed_settings``, a copy of the nearest one.

        ``chosen`` selects one by its folder.

        Returns:
            Notes for the user on the changes.

        Raises:
            FileNotFoundError: there is none.
            FileExistsError: an ``--overwrite`` was interrupted here.
            ValueError: its settings differ, or several are equally near; the message lists them.
        """
        self._finish_overwrite()
        runs = self._runs("--resume", chosen=chosen)
        same = [run for run in runs if not run.differences]
        run = self._nearest(same) if same else self._changed(runs, allow_changed_settings)
        notes = [] if same else [f"going on with a copy of {run.path} under changed settings:\n{_listed(run)}"]
        if not run.whole:
            unknown = f"; not at their defaults: {', '.join(run.unknown)}" if run.unknown else ""
            notes.append(
                f"{run.path} was started by a version that recorded DISTILLER, SOLVER, its distiller's own section and "
                f"the size of its data: all else is taken to have been as it is now{unknown}"
            )
        if not same:
            self._copy(run, notes)
        elif run.path != self.path:
            self._clear_path()
            run.path.rename(self.path)
        write_settings(self.path, self.settings)
        return notes + self._new_length(run.settings)

    def find(self) -> None:
        """Select the run with these settings, regardless of its weights and data, for evaluation.

        Raises:
            FileNotFoundError: there is none.
            ValueError: only runs with other settings, or several with these; the message lists them.
        """
        found = nearest(self._runs("--evaluate", ignore=_GIVEN))
        if found[0].differences:
            raise ValueError(describe("--evaluate", found))
        if len(found) > 1:
            raise ValueError(f"{describe('--evaluate', found)}\nName the checkpoint that is meant: --evaluate FILE")
        self.path = found[0].path

    def _earlier(self) -> Path | None:
        """Return the folder of an existing run with these settings, or None."""
        if self.path.is_dir() and any(entry.name != SETTINGS for entry in self.path.iterdir()):
            return self.path
        return next((run.path for run in read_runs(self._folders(), self.settings) if run.distance == (0, 0)), None)

    def _set_aside(self, earlier: Path | None) -> None:
        if (self.path / CHECKPOINT).is_file() and self._aside.exists():
            shutil.rmtree(self._aside)
        if not self._aside.exists():
            if earlier is not None:
                earlier.rename(self._aside)
        elif self.path.exists():  # from a run that was killed before its first checkpoint
            shutil.rmtree(self.path)

    def _finish_overwrite(self) -> None:
        """Finish an interrupted ``--overwrite``: delete the replaced run; raise if nothing has replaced it yet."""
        if not self._aside.exists():
            return
        if not (self.path / CHECKPOINT).is_file():
            raise FileExistsError(
                f"{self._aside} holds an earlier run, which an --overwrite that has come to no checkpoint was to "
                f"replace: start anew by --overwrite, or move it back to {self.path} to go on with it by --resume"
            )
        shutil.rmtree(self._aside)

    def _changed(self, runs: list[Run], allowed: bool) -> Run:
        """Return the run to resume with changed settings."""
        able = [run for run in runs if not any(map(lasts, run.differences))]
        if able and allowed:
            return self._nearest(able)
        found = nearest(runs)
        lasting = sorted({key for run in found for key in run.differences if lasts(key)})
        advice = f"{', '.join(lasting)} cannot change within a run: start another without --resume"
        if not allowed:
            copied = ", ".join(run.path.name for run in nearest(able)) if able else ""
            advice = "Give it the settings it had, start another run without --resume" + (
                f", or go on with a copy of {copied} by --allow-changed-settings" if able else f"; {advice}"
            )
        raise ValueError(f"{describe('--resume', found)}\n{advice}")

    def _nearest(self, runs: list[Run]) -> Run:
        found = nearest(runs)
        if len(found) > 1 and not found[0].differences:  # of equal ones, the one with the matching name
            found = [run for run in found if run.path == self.path] or found
        if len(found) > 1:
            raise ValueError(f"{describe('--resume', found)}\nName the one that is meant: --from FOLDER")
        return found[0]

    def _copy(self, run: Run, notes: list[str]) -> None:
        """Copy a run's folder here, atomically; checkpoints are copied, not linked, as both may change."""
        self._clear_path()
        partial = self.path.with_name(f"{self.path.name}.copying")
        shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted copy
        try:
            shutil.copytree(run.path, partial, ignore=_not_copied())
            with (partial / _CHANGES).open("a") as file:
                file.writelines(f"{note}\n" for note in notes)
            write_settings(partial, self.settings)
            partial.rename(self.path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._copied = run.path, _stamp(self.path)

    def _clear_path(self) -> None:
        """Delete what a run without a checkpoint left here."""
        if (self.path / CHECKPOINT).exists():
            raise FileExistsError(f"{self.path} holds a checkpoint without {SETTINGS}: move it elsewhere first")
        if self.path.exists():
            shutil.rmtree(self.path)

    def _new_length(self, before: Settings) -> list[str]:
        epochs, now = before.get("SOLVER.EPOCHS"), self.settings["SOLVER.EPOCHS"]
        if epochs == now or not self._guided or self.settings["DISK.DUAL.EPOCHS"] is not None:
            return []
        return [
            f"SOLVER.EPOCHS was {epochs} and is {now}: from here multiplier and budget follow the schedule of {now} "
            f"epochs (DISK.DUAL.EPOCHS sets its length apart)"
        ]

    def _folders(self, ending: str = "") -> list[Path]:
        """Return the folders of this name, with any hash."""
        pattern = "".join(f"[{letter}]" if letter in "*?[" else letter for letter in self._name)
        return sorted(self._parent.glob(f"{pattern}-{'[0-9a-f]' * 8}{ending}"))

    def _runs(self, flag: str, *, ignore: tuple[str, ...] = (), chosen: str | None = None) -> list[Run]:
        """Return the runs of this name that have a checkpoint."""
        runs = read_runs(self._folders(), self.settings, ignore=ignore)
        if chosen is not None:
            meant = (Path(chosen), Path(chosen).resolve())
            named = [run for run in runs if Path(run.path.name) in meant or run.path.resolve() in meant]
            if not named:
                known = ", ".join(run.path.name for run in runs) or "none"
                raise FileNotFoundError(f"--from must name a run in {self._parent}, one of {known}, got {chosen}")
            return named
        if runs:
            return runs
        aside = self._folders(".overwritten")
        kept = f"; an interrupted --overwrite left {', '.join(map(str, aside))}" if aside else ""
        raise FileNotFoundError(
            f"{flag} needs an earlier run with a checkpoint {CHECKPOINT!r} in {self.path}, found none: start it "
            f"without {flag}, or with --overwrite if it ended before its first checkpoint{kept}"
        )


def _listed(run: Run) -> str:
    return "\n".join(run.differences.values())


def _stamp(folder: Path) -> tuple[int, int]:
    """Return what distinguishes a checkpoint from the one that replaces it."""
    status = (folder / CHECKPOINT).stat()
    return status.st_ino, status.st_mtime_ns
