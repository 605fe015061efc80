"""A progress bar where tqdm is installed, which is no requirement."""

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any


def progress_bar(items: Iterable[Any], shown: bool, text: str) -> Iterable[Any]:
    """Show a progress bar over the items if tqdm is installed."""
    if not shown or importlib.util.find_spec("tqdm") is None:
        return items
    bar: Iterable[Any] = importlib.import_module("tqdm").tqdm(items, desc=text)
    return bar
