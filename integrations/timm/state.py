"""What a checkpoint keeps of DiSK beside the student: ``task_state``."""

import logging
from collections.abc import Mapping
from typing import Any

_logger = logging.getLogger(__name__)


def state_of(stateful: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of each object that there is: the loss with its guide, the schedule, the guide's passes."""
    return {name: carried.state_dict() for name, carried in stateful.items() if carried is not None}


def holds_guide(state: Any) -> bool:
    """Return whether a checkpoint's ``task_state`` is DiSK's."""
    return isinstance(state, Mapping) and "disk" in state


def load(stateful: Mapping[str, Any], state: Mapping[str, Any] | None, *, allow_fresh_guide: bool) -> None:
    """Load what ``state_of`` returned.

    Raises:
        RuntimeError: nothing to load and no leave to go on, or a state of another mode or guide.
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
    expected = {name for name, carried in stateful.items() if carried is not None}
    if set(state) != expected:
        raise RuntimeError(
            f"the checkpoint must hold {sorted(expected)}, got {sorted(state)}: the run was joint and is now "
            f"alternating or the reverse, or only one of the two has schedules"
        )
    for name, carried in stateful.items():  # the schedule after the loss, into which it writes
        if carried is not None:
            carried.load_state_dict(state[name])
