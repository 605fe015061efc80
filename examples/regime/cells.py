"""Train every student of a problem and measure: one cell of the map per student width."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arms import ARMS, KD_SETTINGS, TEMPERATURES, Arm, Guided, best, kd
from .problems import Problem
from .stacked import Batch, Stack, cross_entropy, fit, share

DIGITS = 2  # of what is stored


def cells(problem: Problem, widths: Sequence[int], arms: dict[str, Arm] = ARMS) -> list[dict[str, Any]]:
    """Warm-start a student per width and seed, continue with every setting of every method, and measure."""
    warm = [_warm(problem, width) for width in widths]
    trained = {"KD": (KD_SETTINGS, _train_kd(problem, warm))}
    for name, arm in arms.items():
        settings = [arm.loss | {"temperature": temperature} for temperature in TEMPERATURES]
        trained[name] = settings, _train_guided(problem, warm, arm)
    results = []
    for i, width in enumerate(widths):
        methods = {name: _chosen(problem, settings, students[i]) for name, (settings, students) in trained.items()}
        start = {
            "problem": problem.name,
            "classes": problem.num_classes,
            "images": problem.train.y.shape[1],
            "width": width,
            "passes": problem.passes,
        }
        results.append(start | _look(problem, warm[i]) | {"methods": methods})
    return results


def gain(cell: dict[str, Any], name: str) -> list[float]:
    """Return the test accuracy minus KD's per seed, percent points."""
    methods = cell["methods"]
    return [a - b for a, b in zip(methods[name]["test"], methods["KD"]["test"], strict=True)]


def _warm(problem: Problem, width: int) -> Stack:
    sizes = problem.train.x.shape[-1], width, problem.num_classes
    student = Stack.fresh(sizes, problem.seeds, problem.activation)
    _fit(problem, student.parameters, lambda batch: cross_entropy(student, batch))
    return student


def _train_kd(problem: Problem, warm: list[Stack]) -> list[Stack]:
    students = [student.copies(len(KD_SETTINGS)) for student in warm]

    def loss_of(batch: Batch) -> Tensor:
        logits = [student(batch.x)[0] for student in students]
        return sum(kd(torch.cat([each[k] for each in logits]), batch, s) for k, s in enumerate(KD_SETTINGS))

    _fit(problem, [value for student in students for value in student.parameters], loss_of)
    return students


def _train_guided(problem: Problem, warm: list[Stack], arm: Arm) -> list[Stack]:
    students = [student.copies(len(TEMPERATURES)) for student in warm]
    sizes = problem.num_classes, problem.train.teacher_features.shape[-1]
    count = len(warm) * len(problem.seeds)
    torch.manual_seed(0)  # of the guides
    losses = [
        Guided(arm, temperature, students=count, sizes=sizes, passes=problem.passes) for temperature in TEMPERATURES
    ]

    def loss_of(batch: Batch) -> Tensor:
        logits = [student(batch.x)[0] for student in students]
        return sum(loss(torch.cat([each[k] for each in logits]), batch) for k, loss in enumerate(losses))

    parameters = [value for each in (*students, *losses) for value in each.parameters]
    _fit(problem, parameters, loss_of, after_pass=lambda: [loss.step() for loss in losses])
    return students


def _fit(problem: Problem, parameters: list[Tensor], loss_of, after_pass=lambda: None) -> None:
    fit(
        parameters,
        loss_of,
        problem.train,
        passes=problem.passes,
        batch_size=problem.batch_size,
        seeds=problem.seeds,
        after_pass=after_pass,
    )


def _look(problem: Problem, warm: Stack) -> dict[str, Any]:
    """Return ``capacity_gap``'s measurements of the warm-started student per seed, percent."""
    data = problem.train
    predicted = warm.outputs(data.x)[0][0].argmax(-1)
    return {
        "teacher_train": rounded(problem.teacher["train"]),
        "teacher_held_out": rounded(problem.teacher["test"]),
        "student_train": rounded(share(predicted == data.y)),
        "student_held_out": rounded(warm.accuracy(*problem.test)[0]),
        "agreement": rounded(share(predicted == data.teacher_logits.argmax(-1))),
    }


def _chosen(problem: Problem, settings: list[dict[str, Any]], students: Stack) -> dict[str, Any]:
    """Select the setting on validation data, for all seeds together; report it on test data."""
    validation = students.accuracy(*problem.validation).mean(1)
    k = best(validation.tolist())
    test = students.accuracy(*problem.test)[k]
    return {"settings": settings[k], "validation": rounded(validation), "test": rounded(test)}


def rounded(values: Tensor) -> list[float]:
    """Return rounded numbers for the file."""
    return [round(value, DIGITS) for value in values.tolist()]
