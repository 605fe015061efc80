"""The generated tables of docs/evidence."""

import re
from pathlib import Path

PAGES = Path(__file__).parents[1] / "docs" / "evidence"


def shown(page, marker):
    """Return what the page has between the marker's comments, of which it must have one pair."""
    (text,) = re.findall(rf"<!-- {marker} -->\n(.*?)\n<!-- /{marker} -->", (PAGES / page).read_text(), re.DOTALL)
    return text
