"""What limits the student (``capacity_gap``), and what the guide does to each sample (``SampleRecord``).

``capacity_gap`` and recording need only torch; tables and figures need ``pip install 'disk-plugin[plots]'``.
"""

from .capacity import CapacityGap, capacity_gap
from .detection import detection_auroc
from .images import gallery
from .plots import plot_against_ce, plot_over_epochs, plot_per_class
from .record import SampleRecord
from .tables import read

__all__ = [
    "CapacityGap",
    "SampleRecord",
    "capacity_gap",
    "detection_auroc",
    "gallery",
    "plot_against_ce",
    "plot_over_epochs",
    "plot_per_class",
    "read",
]
