"""An experiment's folder: found, kept from being overwritten, and resumed only under the settings it was made with."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import yaml
from yacs.config import CfgNode

from .settings import Settings

SETTINGS = "settings.yaml"
_CHECKPOINT = "latest"
_NOT_DEFINING = ("SOLVER.EPOCHS",)  # may grow from run to run
_GIVEN = ("data", "teacher weights", "DISTILLER.WARM_START")  # files, told apart by what is in them
# what a checkpoint holds or its shapes depend on: no flag makes a resumed run change it
_LASTING = re.compile(
    r"DISTILLER\.|DATASET\.|teacher weights|SOLVER\.(TRAINER|TYPE)|DISK\.(GUIDE\.|STUDENT_TEMPERATURE)"
    r"|DISK\.ALTERNATING\.(OPTIMIZER|REPLAY$|STUDENT_PASSES)|(DISK_)?SIMKD\.FACTOR"
)


class Folder:
    """Where an experiment's checkpoints and logs lie: LOG.PREFIX/EXPERIMENT.PROJECT/NAME-HASH.

    The host puts every option into the folder's name, so that a changed one loses ``--resume``. Here the name is that
    of the experiment and a short hash of the settings that define it; the settings themselves lie inside.
    """

    def __init__(self, cfg: CfgNode, settings: Settings) -> None:
        self.settings = settings
        self._parent = Path(cfg.LOG.PREFIX, cfg.EXPERIMENT.PROJECT)
        self._name = (cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG).replace(os.sep, "_")
        canonical = yaml.safe_dump(_defining(settings), sort_keys=True)
        self.path = self._parent / f"{self._name}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"
        self._aside = self.path.with_name(f"{self.path.name}.overwritten")

    def start(self, *, overwrite: bool) -> None:
        """Begin a run; what ``overwrite`` is to delete is kept aside until :meth:`settle`.

        Raises:
            FileExistsError: the folder holds an earlier run, and ``overwrite`` is not set.
        """
        if self.path.is_dir() and any(entry.name != SETTINGS for entry in self.path.iterdir()):
            if not overwrite:
                raise FileExistsError(
                    f"{self.path} holds an earlier run: go on with it by --resume, or delete it and start anew by "
                    f"--overwrite"
                )
            if (self.path / _CHECKPOINT).is_file() and self._aside.exists():
                shutil.rmtree(self._aside)
            if self._aside.exists():  # of a run that was killed before its first checkpoint
                shutil.rmtree(self.path)
            else:
                self.path.rename(self._aside)
        self._write()

    def settle(self) -> None:
        """Delete the run that was overwritten, or bring it back if the new one has come to no checkpoint."""
        if not self._aside.exists():
            return
        if (self.path / _CHECKPOINT).is_file():
            shutil.rmtree(self._aside)
        else:
            shutil.rmtree(self.path)
            self._aside.rename(self.path)

    def resume(self, *, allow_changed_settings: bool) -> list[str]:
        """Turn to the run with these settings or, if changes are allowed, to the latest of the name.

        Returns:
            What the user should know of the changes.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it had other settings; the message lists them.
        """
        now = _defining(self.settings)
        runs = self._runs("--resume")
        same = [run for run in runs if _defining(run[1]) == now]
        path, settings = (same or runs)[0]
        differences = _differences(_defining(settings), now)
        listed = "\n".join(differences.values())
        lasting = [key for key in differences if _LASTING.match(key)]
        if differences and not allow_changed_settings:
            raise ValueError(
                f"--resume found {path}, whose settings differ:\n{listed}\nGive it the settings it had, start another "
                f"run without --resume, or go on with the new ones by --allow-changed-settings"
            )
        if lasting:
            raise ValueError(
                f"--resume found {path}, whose settings differ:\n{listed}\n{', '.join(lasting)} cannot change within a "
                f"run: start another without --resume"
            )
        notes = [f"going on with {path} under changed settings:\n{listed}"] if differences else []
        if path != self.path:
            if self.path.is_dir():  # settings alone: with a checkpoint it would have been found
                shutil.rmtree(self.path)
            path.rename(self.path)
        self._write()
        return notes + self._new_length(settings)

    def find(self) -> None:
        """Turn to the latest run with these settings, whatever weights and data it was given: for evaluation.

        Raises:
            FileNotFoundError: there is none.
            ValueError: only runs with other settings; the message lists them.
        """

        def comparable(settings: Settings) -> Settings:
            return {key: value for key, value in _defining(settings).items() if key not in _GIVEN}

        runs = self._runs("--evaluate")
        same = [path for path, settings in runs if comparable(settings) == comparable(self.settings)]
        if not same:
            differences = _differences(comparable(runs[0][1]), comparable(self.settings))
            raise ValueError(
                "\n".join([f"--evaluate found {runs[0][0]}, whose settings differ:", *differences.values()])
            )
        self.path = same[0]

    def _new_length(self, before: Settings) -> list[str]:
        epochs, now = before.get("SOLVER.EPOCHS"), self.settings["SOLVER.EPOCHS"]
        if epochs == now or self.settings.get("DISK.DUAL.EPOCHS", now) is not None:
            return []
        return [
            f"SOLVER.EPOCHS was {epochs} and is {now}: from here multiplier and budget follow the schedule of {now} "
            f"epochs (DISK.DUAL.EPOCHS sets its length apart)"
        ]

    def _runs(self, flag: str) -> list[tuple[Path, Settings]]:
        """Runs of this name that have a checkpoint, the latest first."""
        pattern = "".join(f"[{letter}]" if letter in "*?[" else letter for letter in self._name)
        found = [path for path in self._parent.glob(f"{pattern}-{'[0-9a-f]' * 8}") if (path / _CHECKPOINT).is_file()]
        found = [path for path in found if (path / SETTINGS).is_file()]
        found.sort(key=lambda path: (path / _CHECKPOINT).stat().st_mtime, reverse=True)
        if not found:
            raise FileNotFoundError(
                f"{flag} needs an earlier run with a checkpoint {_CHECKPOINT!r} in {self.path}, found none: start it "
                f"without {flag}, or with --overwrite if it ended before its first checkpoint"
            )
        return [(path, self._added() | yaml.safe_load((path / SETTINGS).read_text())) for path in found]

    def _added(self) -> Settings:
        """Return settings that came later than some runs, as those runs had them."""
        capacity = "DISK.ALTERNATING.REPLAY_CAPACITY"
        added = {"DISK.ALTERNATING.REPLAY": False, capacity: self.settings.get(capacity)}
        return {key: value for key, value in added.items() if key in self.settings}

    def _write(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / f"{SETTINGS}.partial"
        partial.write_text(yaml.safe_dump(self.settings, sort_keys=True))
        partial.replace(self.path / SETTINGS)


def _defining(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key not in _NOT_DEFINING}


def _differences(before: Settings, now: Settings) -> dict[str, str]:
    """A line for each key whose value differs."""
    keys = sorted(before.keys() | now.keys())
    pairs = {key: (before.get(key, "not set"), now.get(key, "not set")) for key in keys}
    return {key: f"  {key}: {then} then, {after} now" for key, (then, after) in pairs.items() if then != after}
