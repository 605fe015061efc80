"""DiSK's state in a checkpoint, beside the student: ``task_state``."""

import logging
from collections.abc import Mapping
from typing import Any

from disk_plugin.training.guided_training import check_parts

_logger = logging.getLogger(__name__)


def holds_guide(state: Any) -> bool:
    """Return whether a checkpoint's ``task_state`` is DiSK's."""
    return isinstance(state, Mapping) and "disk" in state


def load(stateful: Mapping[str, Any], state: Mapping[str, Any] | None, *, allow_fresh_guide: bool) -> None:
    """Load the state of each part: the loss with its guide, the method, the schedule, the guide's passes.

    Raises:
        RuntimeError: no state without ``allow_fresh_guide``, or a state of another mode or guide.
    """
    if state is None or not holds_guide(state):
        if not allow_fresh_guide:
            raise RuntimeError(
                "the checkpoint must hold DiSK's state (guide, multiplier, budget, their progress) under 'task_state', "
                f"got {sorted(state or {}) or 'none'}: it is of a run without DiSK. --disk-allow-fresh-guide "
                "(allow_fresh_guide=True) goes on with its student and a new guide"
            )
        _logger.warning("The checkpoint holds no state of DiSK: its student goes on with an untrained guide.")
        return
    check_parts(state, stateful)
    for name, carried in stateful.items():  # the schedule after the loss, into which it writes
        carried.load_state_dict(state[name])
