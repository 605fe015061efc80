"""A method's stage before training, on one pass of the teacher over the host's loader."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch import distributed as dist

from disk_plugin.features.method import Outputs

from .guided_task import GuidedTask


def prepare_method(
    task: GuidedTask,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda image, target: (image, target),
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: bool = True,
) -> str | None:
    """Run the stage that the task's method has before training; return its report, None if there is nothing to do.

    A resumed task has loaded what the stage left. In several processes each must call it.

    Args:
        task: with a method.
        loader: of the training data.
        prepare: (image, target) of the loader -> images and target on the device.
        autocast: the host's autocast context.
        progress: whether to show a bar.
    """
    method = task.training_core.guided.method
    if method is None or method.prepared:
        return None

    def batches() -> Iterator[tuple[Outputs, Tensor]]:
        for batch in loader:
            image, target = prepare(*batch)
            with autocast():
                _, _, shown = task._teacher(image)
            if shown is not None:
                yield shown, target

    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return method.prepare(batches(), shared=several, progress=progress)
