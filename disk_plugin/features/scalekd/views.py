"""The two views in which ScaleKD compares feature maps: as they are, and without their mean over space."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...functional._positions import promote

_EPS = 1e-6  # of the norm over channels; the authors' 1e-12 makes a slope of 1e12 where a map is 0


def without_dc(feature_map: Tensor) -> Tensor:
    """Subtract each channel's mean over space.

    This is the authors' way through the frequencies, exactly: a 2-D DCT, its coefficient (0, 0) set to 0, and the
    inverse. The basis function of that coefficient is constant, so it holds the mean and nothing else.

    Shape:
        (N, C, H, W), not 1 x 1; returns the same shape.

    Raises:
        ValueError: a map of size 1 x 1, of which nothing is left.
    """
    if feature_map.ndim != 4:
        raise ValueError(f"feature_map must have shape (N, C, H, W), got {tuple(feature_map.shape)}")
    if feature_map.shape[2:].numel() == 1:
        raise ValueError(
            "a map of size 1 x 1 is its own mean, so that nothing is left without it: set dc_removed_weight=0, or give "
            "larger images"
        )
    return feature_map - feature_map.mean((2, 3), keepdim=True)


def view_distance(student_map: Tensor, teacher_map: Tensor, *, dc: bool = True) -> Tensor:
    r"""Return the distance of two maps per sample: the mean over locations of 2 (1 - cos), in [0, 4].

    $$\frac{1}{HW} \sum_{h,w} \Big\| \frac{S_{hw}}{\|S_{hw}\|} - \frac{T_{hw}}{\|T_{hw}\|} \Big\|^2$$

    The norms are over channels. The authors sum over locations, so that their weight of 0.08 for 7 x 7 of them is a
    weight of 3.9 here, where it keeps its meaning at any size. No gradient reaches the teacher's map. A sample whose
    teacher's map is not finite has distance NaN and no gradient, as a caller may ignore it.

    Args:
        student_map: the student's map, projected to the teacher's width and size.
        teacher_map: the teacher's map.
        dc: whether the means over space stay in the maps; see ``without_dc``.

    Shape:
        maps (N, C, H, W); returns (N,), float32 at least.

    Raises:
        ValueError: maps of different shapes; maps of size 1 x 1 without their mean.
    """
    if student_map.ndim != 4 or student_map.shape != teacher_map.shape:
        raise ValueError(
            f"both maps must have one shape (N, C, H, W), got {tuple(student_map.shape)} of the student and "
            f"{tuple(teacher_map.shape)} of the teacher"
        )
    found, wanted = promote(student_map, teacher_map.detach())
    finite = wanted.flatten(1).isfinite().all(1)
    wanted = torch.where(finite.view(-1, 1, 1, 1), wanted, found.detach())
    if not dc:
        found, wanted = without_dc(found), without_dc(wanted)
    difference = F.normalize(found, dim=1, eps=_EPS) - F.normalize(wanted, dim=1, eps=_EPS)
    distance = difference.square().sum(1).flatten(1).mean(1)
    return torch.where(finite, distance, torch.nan)
