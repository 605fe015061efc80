"""See what the guide does: record each sample while training, look at the record, score it as a finder of bad labels.

Recording needs torch alone; tables and figures need ``pip install 'disk-plugin[plots]'``.
"""

from .detection import detection_auroc
from .images import gallery
from .plots import plot_against_ce, plot_over_epochs, plot_per_class
from .record import SampleRecord
from .tables import read

__all__ = [
    "SampleRecord",
    "detection_auroc",
    "gallery",
    "plot_against_ce",
    "plot_over_epochs",
    "plot_per_class",
    "read",
]
