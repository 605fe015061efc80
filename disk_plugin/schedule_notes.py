"""What to tell someone whose run is too short for its schedule."""

from .schedule import DualScheduler


def low_multiplier(dual: DualScheduler, steps: int, *, period: str, multiplier: str) -> str | None:
    """Say what would otherwise go unseen: in a short run the cosine restarts before the multiplier has risen.

    Args:
        dual: the schedule; None is said of one whose multiplier follows from the run.
        steps: how many of its epochs will be run.
        period: how the host spells a period of all steps, such as ``"--period 8"``.
        multiplier: how it spells a constant multiplier at the upper end.
    """
    if dual.rule == "ascent":
        return None
    highest, upper = max((dual(step)[0] for step in range(steps)), default=0.0), dual.multiplier_max
    if highest >= upper / 2:
        return None
    longer = f"{period} lets it rise through the whole run, " if steps > 2 else ""
    return (
        f"in the {steps} steps of its schedule the multiplier comes to at most {highest:.3g} of {upper:.3g}, so that "
        f"the budget is hardly enforced: {longer}{multiplier} keeps it constant"
    )
