"""The oldest transformers that the adapter works with."""

import re

OLDEST = (4, 57, 1)
_PIP = "pip install 'transformers>=4.57.1' 'accelerate>=1.10'"


def check() -> None:
    """Raise ImportError, naming the pip line, if transformers is absent or too old."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"disk_plugin.integrations.transformers needs transformers, found none: {_PIP}") from error
    if tuple(int(number) for number in re.findall(r"\d+", transformers.__version__)[:3]) < OLDEST:
        raise ImportError(
            f"disk_plugin.integrations.transformers needs transformers >= 4.57.1, got {transformers.__version__}: "
            f"{_PIP}"
        )
