"""Paired timings of two ways of doing one thing, alternating so that drift affects both alike; and their tables."""

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import stats
from tqdm import trange


class Ratio(NamedTuple):
    """Median of ours / theirs over the pairs, with a distribution-free 95 % interval, and both medians in seconds."""

    median: float
    low: float
    high: float
    ours: float
    theirs: float
    pairs: int


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], *, pairs: int, warmup: int = 3, calls: int = 1
) -> Ratio:
    """Time the two in pairs, in an order that alternates from pair to pair.

    Each time is the mean over ``calls`` consecutive calls, for calls too short for the clock.
    """
    for _ in range(warmup):
        ours()
        theirs()
    times: list[tuple[float, float]] = []
    for pair in trange(pairs, leave=False):
        if pair % 2:
            times.append((_seconds(ours, calls), _seconds(theirs, calls)))
        else:
            second = _seconds(theirs, calls)
            times.append((_seconds(ours, calls), second))
    ratios = [a / b for a, b in times]
    interval = stats.quantile_test(ratios, p=0.5).confidence_interval(0.95)
    mine, other = (sorted(column)[pairs // 2] for column in zip(*times, strict=True))
    return Ratio(sorted(ratios)[pairs // 2], float(interval.low), float(interval.high), mine, other, pairs)


def machine(device: str = "cpu") -> str:
    """Describe the hardware and versions."""
    count = torch.get_num_threads()
    cpu = f"{platform.machine()} CPU, {count} thread{'s' * (count > 1)}"
    name = cpu if device == "cpu" else torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__.split('+')[0]}"


def row(what: str, ratio: Ratio, bar: float | None = None) -> dict[str, Any]:
    """Return a row of :func:`table`; ``bar`` is the target ratio, if any."""
    return {"what": what, "bar": bar, **ratio._asdict()}


def results(rows: list[dict[str, Any]], setting: str, device: str = "cpu") -> dict[str, Any]:
    """Return the results to store as JSON: the rows, what was measured and where."""
    return {"machine": machine(device), "setting": setting, "rows": rows}


def table(found: dict[str, Any]) -> str:
    """Return results as Markdown; a bar is met when the interval's lower end is at or below it."""
    lines = [
        f"{found['setting']}; {found['machine']}.",
        "",
        "| ours / theirs | median ratio | 95 % interval | bar | pairs | ours / theirs, each |",
        "|---|---|---|---|---|---|",
    ]
    for each in found["rows"]:
        interval = f"{each['low']:.3f} to {each['high']:.3f}"
        times = f"{_readable(each['ours'])} / {_readable(each['theirs'])}"
        bar = "" if each["bar"] is None else f"{each['bar']:.2f}"
        lines.append(f"| {each['what']} | {each['median']:.3f} | {interval} | {bar} | {each['pairs']} | {times} |")
    return "\n".join(lines)


def keep(found: dict[str, Any], folder: Path | None, name: str) -> None:
    """Write results as ``folder``/``name``.json, if there is a folder."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def _seconds(step: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _readable(seconds: float) -> str:
    unit, size = next(pair for pair in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if seconds >= pair[1] or pair[1] < 1e-5)
    return f"{seconds / size:.3g} {unit}"
