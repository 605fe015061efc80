"""Every bad input is refused with an error that says what was expected and what came."""

import ast
import copy
import json
import math
import pathlib
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import disk_plugin
from disk_plugin import DiSKLoss, DualScheduler, GuideHead, functional
from disk_plugin.cache import SeededViews
from disk_plugin.diagnostics import SampleRecord
from disk_plugin.replay import GuideReplay
from disk_plugin.taps import with_features
from disk_plugin.variants import VARIANTS

N, C, D = 4, 5, 3
INDICES = torch.zeros(N, dtype=torch.int64)
ONE_HALF = torch.full((2,), 0.5)


# ---- helpers ---------------------------------------------------------------------------------------------------------


def logits(*shape, dtype=torch.float32):
    return torch.zeros(*(shape or (N, C)), dtype=dtype)


def make_loss(feature_dim=0, **settings):
    return DiSKLoss(GuideHead(C, feature_dim), **settings)


def refuses(error, *parts):
    """Expect an error whose message has the parts, literally and in this order."""
    return pytest.raises(error, match=".*".join(re.escape(part) for part in parts))


class Guide(nn.Module):
    """A guide that returns whatever it is given to return."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, teacher_logits):
        return self.output


# ---- numbers and modes: module and function alike --------------------------------------------------------------------

SETTINGS_REFUSED = [
    ("temperature", 0.0, ValueError, "> 0, got 0.0"),
    ("temperature", -4, ValueError, "> 0, got -4"),
    ("temperature", math.nan, ValueError, "> 0, got nan"),
    ("temperature", math.inf, ValueError, "finite, got inf"),
    ("temperature", "4", TypeError, "a number, got str '4'"),
    ("temperature", True, TypeError, "a number, got bool True"),
    ("temperature", None, TypeError, "a number, got NoneType"),
    ("temperature", torch.ones(2), ValueError, "a number or a tensor with one element, got shape (2,)"),
    ("student_temperature", 0, ValueError, "> 0, got 0"),
    ("student_temperature", -1.0, ValueError, "> 0, got -1.0"),
    ("student_temperature", math.nan, ValueError, "> 0, got nan"),
    ("student_temperature", math.inf, ValueError, "finite, got inf"),
    ("student_temperature", True, TypeError, "a number, got bool True"),
    ("student_temperature", [4.0], TypeError, "a number, got list"),
    ("top_k", 0, ValueError, ">= 1, got 0"),
    ("top_k", -1, ValueError, ">= 1, got -1"),
    ("top_k", 20.0, TypeError, "an int, got float 20.0"),
    ("top_k", True, TypeError, "an int, got bool True"),
    ("top_k", "all", TypeError, "an int, got str 'all'"),
    ("ce_weight", -0.1, ValueError, ">= 0, got -0.1"),
    ("ce_weight", math.nan, ValueError, ">= 0, got nan"),
    ("ce_weight", math.inf, ValueError, "finite, got inf"),
    ("ce_weight", None, TypeError, "a number, got NoneType"),
    ("distill_weight", -0.9, ValueError, ">= 0, got -0.9"),
    ("distill_weight", math.nan, ValueError, ">= 0, got nan"),
    ("distill_weight", "0.9", TypeError, "a number, got str"),
    ("multiplier", -50.0, ValueError, ">= 0, got -50.0"),
    ("multiplier", math.inf, ValueError, "finite, got inf"),
    ("multiplier", math.nan, ValueError, ">= 0, got nan"),
    ("multiplier", (0.1, 50.0), TypeError, "a number, got tuple"),
    ("multiplier", torch.zeros(2), ValueError, "one element, got shape (2,)"),
    ("budget", -0.3, ValueError, ">= 0, got -0.3"),
    ("budget", math.nan, ValueError, ">= 0, got nan"),
    ("budget", None, TypeError, "a number, got NoneType"),
    ("guide_gradient_scale", 0, ValueError, "> 0, got 0"),
    ("guide_gradient_scale", -0.3, ValueError, "> 0, got -0.3"),
    ("guide_gradient_scale", math.nan, ValueError, "> 0, got nan"),
    ("guide_gradient_scale", math.inf, ValueError, "finite, got inf"),
    ("guide_gradient_scale", False, TypeError, "a number, got bool False"),
    ("ignore_index", 255.0, TypeError, "an int, got float 255.0"),
    ("ignore_index", True, TypeError, "an int, got bool True"),
    ("ignore_index", None, TypeError, "an int, got NoneType"),
    ("variant", "offical_cifar", ValueError, "['official_cifar', 'official_imagenet', 'paper']"),
    ("variant", "offical_cifar", ValueError, "got 'offical_cifar'"),
    ("variant", None, ValueError, "got None"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), SETTINGS_REFUSED)
def test_bad_setting_passed_both_module_and_function(name, value, error, message):
    if value is not None or name not in ("multiplier", "budget", "distill_weight"):  # None: what the form says
        with refuses(error, f"{name} must be", message):
            make_loss(**{name: value})
    with refuses(error, f"{name} must be", message):
        functional.disk_terms(logits(), logits(), INDICES, logits(N), **{name: value})


@pytest.mark.parametrize("mode", ["fitted", "FIT", ""])
def test_unknown_student_temperature_mode_passed(mode):
    with refuses(ValueError, "student_temperature must be one of ['fit']", f"got {mode!r}"):
        make_loss(student_temperature=mode)


def test_a_mode_of_the_module_passed_the_function():
    with refuses(TypeError, "student_temperature must be a number, got str 'fit'"):
        functional.disk_terms(logits(), logits(), INDICES, logits(N), student_temperature="fit")


@pytest.mark.parametrize(
    ("guide", "got"), [(None, "NoneType"), (GuideHead, "type"), (len, "builtin_function_or_method"), (C, "int")]
)
def test_a_guide_that_is_no_module_passed(guide, got):
    with refuses(TypeError, "guide must be a Module such as GuideHead(num_classes)", f"got {got}"):
        DiSKLoss(guide)


def test_settings_passed_by_position():
    with pytest.raises(TypeError, match="positional arguments"):
        DiSKLoss(GuideHead(C), 0.1)
    with pytest.raises(TypeError, match="positional arguments"):
        functional.disk_terms(logits(), logits(), INDICES, logits(N), 0.1)


def test_an_unknown_setting_passed():
    with pytest.raises(TypeError, match="unexpected keyword argument 'alpha'"):
        make_loss(alpha=0.1)


# ---- logits ----------------------------------------------------------------------------------------------------------

LOGITS_REFUSED = [
    (
        logits(64, 100),
        logits(64, 1000),
        ValueError,
        "teacher_logits must have the shape of student_logits (64, 100), got (64, 1000)",
    ),
    (logits(4, 5), logits(3, 5), ValueError, "shape of student_logits (4, 5), got (3, 5)"),
    (logits(4, 5, 2), logits(4, 5), ValueError, "shape of student_logits (4, 5, 2), got (4, 5)"),
    (logits(5), logits(5), ValueError, "student_logits must have shape (N, C) or (N, C, d1, ...), got (5,)"),
    (torch.zeros(()), torch.zeros(()), ValueError, "student_logits must have shape (N, C) or (N, C, d1, ...), got ()"),
    (logits(4, 1), logits(4, 1), ValueError, "at least 2 classes along dimension 1, got shape (4, 1)"),
    (logits(4, 0), logits(4, 0), ValueError, "at least 2 classes along dimension 1, got shape (4, 0)"),
    (logits(4, 1, 7), logits(4, 1, 7), ValueError, "at least 2 classes along dimension 1, got shape (4, 1, 7)"),
    ([[0.0] * 5], logits(1, 5), TypeError, "student_logits must be a Tensor, got list"),
    (logits(1, 5), None, TypeError, "teacher_logits must be a Tensor, got NoneType"),
    (logits().numpy(), logits(), TypeError, "student_logits must be a Tensor, got ndarray"),
    ((logits(), logits()), logits(), TypeError, "student_logits must be a Tensor, got tuple"),
    (logits().long(), logits(), TypeError, "student_logits must be floating-point, got torch.int64"),
    (logits(), logits().bool(), TypeError, "teacher_logits must be floating-point, got torch.bool"),
    (logits(), logits().to(torch.complex64), TypeError, "teacher_logits must be floating-point, got torch.complex64"),
]


CALLS_WITH_LOGITS = {
    "DiSKLoss": lambda student, teacher: make_loss()(student, teacher, INDICES),
    "disk_terms": lambda student, teacher: functional.disk_terms(student, teacher, INDICES, logits(N)),
    "disk_loss": lambda student, teacher: functional.disk_loss(student, teacher, INDICES, logits(N)),
    "kd_loss": lambda student, teacher: functional.kd_loss(student, teacher, INDICES),
    "scaffolded_kl": lambda student, teacher: functional.scaffolded_kl(student, teacher, logits(N)),
    "discount": lambda student, teacher: functional.discount(student, teacher, logits(N)),
    "optimal_guide": lambda student, teacher: functional.optimal_guide(student, teacher, INDICES, multiplier=1.0),
    "optimal_multiplier": lambda student, teacher: functional.optimal_multiplier(student, teacher, INDICES, budget=0.3),
    "fit_student_temperature": functional.fit_student_temperature,
    "student_temperature_step": lambda student, teacher: functional.student_temperature_step(
        student, teacher, torch.zeros(2), torch.tensor(4.0)
    ),
}


@pytest.mark.parametrize("function", CALLS_WITH_LOGITS)
@pytest.mark.parametrize(("student", "teacher", "error", "message"), LOGITS_REFUSED)
def test_bad_logits_passed(function, student, teacher, error, message):
    with refuses(error, message):
        CALLS_WITH_LOGITS[function](student, teacher)


@pytest.mark.parametrize(
    ("student", "error", "message"),
    [
        (logits(5), ValueError, "student_logits must have shape (N, C) or (N, C, d1, ...), got (5,)"),
        (logits(4, 1), ValueError, "at least 2 classes along dimension 1, got shape (4, 1)"),
        (logits().int(), TypeError, "student_logits must be floating-point, got torch.int32"),
    ],
)
def test_bad_logits_passed_usage(student, error, message):
    with refuses(error, message):
        functional.usage(student, INDICES, logits(N))


# ---- the guide -------------------------------------------------------------------------------------------------------


def test_one_class_passed_the_guide():
    with refuses(ValueError, "num_classes must be >= 2, got 1"):
        GuideHead(1)


@pytest.mark.parametrize(
    ("feature_dim", "features", "error", "message"),
    [
        (D, None, ValueError, "the guide was built with feature_dim=3, got no teacher_features"),
        (D, logits(N, D + 1), ValueError, "teacher_features must have shape (4, 3), got (4, 4)"),
        (D, logits(N + 1, D), ValueError, "teacher_features must have shape (4, 3), got (5, 3)"),
        (D, logits(N, D, 2), ValueError, "teacher_features must have shape (4, 3), got (4, 3, 2)"),
        (0, logits(N, D), ValueError, "built without features (feature_dim=0), got teacher_features of shape (4, 3)"),
        (D, [[0.0] * D] * N, TypeError, "teacher_features must be a Tensor, got list"),
        (D, logits(N, D).long(), TypeError, "teacher_features must be floating-point, got torch.int64"),
    ],
)
def test_bad_features_passed(feature_dim, features, error, message):
    with refuses(error, message):
        make_loss(feature_dim)(logits(), logits(), INDICES, features)


def test_dense_features_of_another_resolution_passed():
    student = logits(N, C, 2, 2)
    with refuses(ValueError, "teacher_features must have shape (4, 3) or (4, 3, 2, 2), got (4, 3, 1, 1)"):
        make_loss(D)(student, student, torch.zeros(N, 2, 2).long(), logits(N, D, 1, 1))


def test_logits_of_another_width_than_the_guides_passed():
    with refuses(ValueError, "teacher_logits must have shape (N, 5, ...), got (4, 6)"):
        make_loss()(logits(N, C + 1), logits(N, C + 1), INDICES)


GUIDE_LOGITS_REFUSED = [
    (logits(N, 1), ValueError, "guide_logits must have shape (4,), got (4, 1)"),
    (logits(N, C), ValueError, "guide_logits must have shape (4,), got (4, 5)"),
    (logits(1), ValueError, "guide_logits must have shape (4,), got (1,)"),
    (torch.zeros(()), ValueError, "guide_logits must have shape (4,), got ()"),
    ((logits(N),), TypeError, "guide_logits must be a Tensor, got tuple"),
    (0.5, TypeError, "guide_logits must be a Tensor, got float"),
    (logits(N).bool(), TypeError, "guide_logits must be floating-point, got torch.bool"),
]


CALLS_WITH_GUIDE_LOGITS = {
    "DiSKLoss": lambda guide_logits: DiSKLoss(Guide(guide_logits))(logits(), logits(), INDICES),
    "disk_terms": lambda guide_logits: functional.disk_terms(logits(), logits(), INDICES, guide_logits),
    "scaffolded_kl": lambda guide_logits: functional.scaffolded_kl(logits(), logits(), guide_logits),
    "discount": lambda guide_logits: functional.discount(logits(), logits(), guide_logits),
    "usage": lambda guide_logits: functional.usage(logits(), INDICES, guide_logits),
}


@pytest.mark.parametrize("function", CALLS_WITH_GUIDE_LOGITS)
@pytest.mark.parametrize(("guide_logits", "error", "message"), GUIDE_LOGITS_REFUSED)
def test_bad_guide_logits_passed(function, guide_logits, error, message):
    with refuses(error, message):
        CALLS_WITH_GUIDE_LOGITS[function](guide_logits)


def test_dense_guide_logits_of_another_shape_passed():
    dense = logits(N, C, 2, 3)
    with refuses(ValueError, "guide_logits must have shape (4, 2, 3), got (4, 3, 2)"):
        functional.disk_terms(dense, dense, torch.zeros(N, 2, 3).long(), logits(N, 3, 2))


# ---- target and weight -----------------------------------------------------------------------------------------------

TARGETS_REFUSED = [
    (INDICES[:3], ValueError, "torch.int64 of shape (3,)"),
    (INDICES[:, None], ValueError, "torch.int64 of shape (4, 1)"),
    (torch.zeros(N, C).long(), ValueError, "torch.int64 of shape (4, 5)"),
    (logits(N, C + 1), ValueError, "torch.float32 of shape (4, 6)"),
    (logits(N, C, 1), ValueError, "torch.float32 of shape (4, 5, 1)"),
    (INDICES.int(), TypeError, "torch.int32 of shape (4,)"),
    (INDICES.to(torch.uint8), TypeError, "torch.uint8 of shape (4,)"),
    (INDICES.bool(), TypeError, "torch.bool of shape (4,)"),
    (torch.zeros(N, C).bool(), TypeError, "torch.bool of shape (4, 5)"),
    (INDICES.float(), TypeError, "torch.float32 of shape (4,): call target.long() if these are class indices"),
]
EXPECTED_TARGET = (
    "target must be int64 class indices of shape (4,) or floating-point probabilities of shape (4, 5), got"
)


def calls_with_target(target):
    return {
        "DiSKLoss": lambda: make_loss()(logits(), logits(), target),
        "disk_terms": lambda: functional.disk_terms(logits(), logits(), target, logits(N)),
        "kd_loss": lambda: functional.kd_loss(logits(), logits(), target),
        "usage": lambda: functional.usage(logits(), target, logits(N)),
        "optimal_guide": lambda: functional.optimal_guide(logits(), logits(), target, multiplier=1.0),
        "optimal_multiplier": lambda: functional.optimal_multiplier(logits(), logits(), target, budget=0.3),
    }


@pytest.mark.parametrize(("target", "error", "message"), TARGETS_REFUSED)
def test_bad_target_passed(target, error, message):
    for call in calls_with_target(target).values():
        with refuses(error, EXPECTED_TARGET, message):
            call()


@pytest.mark.parametrize(("target", "got"), [([0] * N, "list"), (None, "NoneType"), (INDICES.numpy(), "ndarray")])
def test_a_target_that_is_no_tensor_passed(target, got):
    for call in calls_with_target(target).values():
        with refuses(TypeError, f"target must be a Tensor, got {got}"):
            call()


@pytest.mark.parametrize("target", [torch.zeros(N).long(), torch.zeros(N, 3, 2).long(), logits(N, C, 3, 2)])
def test_dense_target_of_another_shape_passed(target):
    dense = logits(N, C, 2, 3)
    with refuses(ValueError, "shape (4, 2, 3) or", "shape (4, 5, 2, 3), got", f"of shape {tuple(target.shape)}"):
        make_loss()(dense, dense, target)


@pytest.mark.parametrize("index", [C, -1, 255])
@pytest.mark.parametrize("variant", ["paper", "official_cifar", "official_imagenet"])
def test_class_index_out_of_range_passed(index, variant):
    for call in (
        lambda: make_loss(variant=variant, top_k=2)(logits(), logits(), torch.full((N,), index)),
        lambda: functional.kd_loss(logits(), logits(), torch.full((N,), index)),
        lambda: functional.usage(logits(), torch.full((N,), index), logits(N)),
    ):
        with pytest.raises(ValueError, match=rf"class indices in \[0, {C}\).* or ignore_index=-100, got {index}"):
            call()


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (logits(N + 1), ValueError, "sample_weight must have shape (4,) or (4,), got (5,)"),
        (logits(N, 1), ValueError, "sample_weight must have shape (4,) or (4,), got (4, 1)"),
        (logits(N, C), ValueError, "sample_weight must have shape (4,) or (4,), got (4, 5)"),
        (torch.ones(()), ValueError, "sample_weight must have shape (4,) or (4,), got ()"),
        (torch.ones(N).long(), TypeError, "sample_weight must be floating-point, got torch.int64"),
        (torch.ones(N).bool(), TypeError, "sample_weight must be floating-point, got torch.bool"),
        ([1.0] * N, TypeError, "sample_weight must be a Tensor, got list"),
        (2.0, TypeError, "sample_weight must be a Tensor, got float"),
    ],
)
def test_bad_sample_weight_passed(weight, error, message):
    for call in (
        lambda: make_loss()(logits(), logits(), INDICES, sample_weight=weight),
        lambda: functional.disk_terms(logits(), logits(), INDICES, logits(N), sample_weight=weight),
        lambda: functional.kd_loss(logits(), logits(), INDICES, sample_weight=weight),
        lambda: functional.usage(logits(), INDICES, logits(N), sample_weight=weight),
    ):
        with refuses(error, message):
            call()


def test_dense_sample_weight_of_another_shape_passed():
    dense = logits(N, C, 2, 3)
    for shape in ((2, 3), (N, 3, 2), (N, 2)):
        with refuses(ValueError, f"sample_weight must have shape (4,) or (4, 2, 3), got {shape}"):
            make_loss()(dense, dense, torch.zeros(N, 2, 3).long(), sample_weight=torch.ones(shape))


@pytest.mark.parametrize("reduction", ["max", "batchmean", None, ""])
def test_unknown_reduction_passed(reduction):
    for call in (
        lambda: make_loss().terms(logits(), logits(), INDICES, reduction=reduction),
        lambda: functional.disk_terms(logits(), logits(), INDICES, logits(N), reduction=reduction),
        lambda: functional.kd_loss(logits(), logits(), INDICES, reduction=reduction),
        lambda: functional.scaffolded_kl(logits(), logits(), logits(N), reduction=reduction),
        lambda: functional.usage(logits(), INDICES, logits(N), reduction=reduction),
    ):
        with refuses(ValueError, f"reduction must be one of ['mean', 'sum', 'none'], got {reduction!r}"):
            call()


def test_a_refused_batch_leaves_the_state_as_it_was():
    disk, student = make_loss(), torch.randn(N, C)
    disk(student, torch.randn(N, C), INDICES)
    before = copy.deepcopy(disk.state_dict())
    for bad in ({"target": INDICES.int()}, {"sample_weight": torch.ones(N + 1)}, {"reduction": "max"}):
        arguments = {"student_logits": student, "teacher_logits": torch.randn(N, C), "target": INDICES} | bad
        with pytest.raises((TypeError, ValueError), match="must"):
            disk.terms(**arguments)
        torch.testing.assert_close(disk.state_dict(), before, rtol=0, atol=0)


# ---- values passed to the other functions ----------------------------------------------------------------------------

FUNCTIONS = {
    "kd_loss": lambda **settings: functional.kd_loss(logits(), logits(), INDICES, **settings),
    "scaffolded_kl": lambda **settings: functional.scaffolded_kl(logits(), logits(), logits(N), **settings),
    "discount": lambda **settings: functional.discount(logits(), logits(), logits(N), **settings),
    "optimal_guide": lambda **settings: functional.optimal_guide(
        logits(), logits(), INDICES, **{"multiplier": 1.0} | settings
    ),
    "optimal_multiplier": lambda **settings: functional.optimal_multiplier(
        logits(), logits(), INDICES, **{"budget": 0.3} | settings
    ),
    "fit_student_temperature": lambda **settings: functional.fit_student_temperature(logits(), logits(), **settings),
    "student_temperature_step": lambda **settings: functional.student_temperature_step(
        logits(), logits(), torch.zeros(2), torch.tensor(4.0), **settings
    ),
    "scaffold_mask": lambda **settings: functional.scaffold_mask(logits(), **settings),
}
TAKES = {
    "temperature": (
        "kd_loss",
        "scaffolded_kl",
        "discount",
        "optimal_guide",
        "optimal_multiplier",
        "fit_student_temperature",
        "student_temperature_step",
    ),
    "student_temperature": ("kd_loss", "scaffolded_kl", "discount", "optimal_guide", "optimal_multiplier"),
    "top_k": ("scaffolded_kl", "discount", "optimal_guide", "optimal_multiplier", "scaffold_mask"),
    "ce_weight": ("kd_loss",),
    "distill_weight": ("kd_loss", "optimal_guide", "optimal_multiplier"),
    "multiplier": ("optimal_guide",),
}


@pytest.mark.parametrize(
    ("function", "name", "value", "error", "message"),
    [(function, *case) for case in SETTINGS_REFUSED for function in TAKES.get(case[0], ())],
)
def test_bad_value_passed_a_function(function, name, value, error, message):
    with refuses(error, f"{name} must be", message):
        FUNCTIONS[function](**{name: value})


@pytest.mark.parametrize("budget", [0, -0.3, math.nan])
def test_a_budget_that_no_multiplier_meets_passed(budget):
    with refuses(ValueError, f"budget must be > 0, got {budget}"):
        FUNCTIONS["optimal_multiplier"](budget=budget)


@pytest.mark.parametrize(("momentum", "rule"), [(0.0, "> 0"), (-0.1, "> 0"), (1.1, "<= 1"), (math.nan, "> 0")])
def test_bad_momentum_passed_student_temperature_step(momentum, rule):
    with refuses(ValueError, f"momentum must be {rule}, got {momentum}"):
        FUNCTIONS["student_temperature_step"](momentum=momentum)


@pytest.mark.parametrize("function", ["scaffolded_kl", "discount"])
def test_unknown_teacher_target_passed(function):
    with refuses(ValueError, "teacher_target must be one of ['all', 'scaffolded'], got 'none'"):
        FUNCTIONS[function](teacher_target="none")


@pytest.mark.parametrize("label", [INDICES[:3], INDICES[:, None], torch.zeros(N, 2).long(), INDICES.float(), [0] * N])
@pytest.mark.parametrize("function", ["scaffold_mask", "scaffolded_kl", "discount"])
def test_bad_label_passed_a_function(function, label):
    with pytest.raises((TypeError, ValueError), match=r"label must .*got"):
        FUNCTIONS[function](top_k=2, label=label)


@pytest.mark.parametrize(
    ("teacher", "error"),
    [(logits(C), ValueError), (torch.zeros(()), ValueError), (logits().long(), TypeError), ([[0.0] * C], TypeError)],
)
@pytest.mark.parametrize("top_k", [2, None])
def test_bad_logits_passed_scaffold_mask(teacher, error, top_k):
    with pytest.raises(error, match=r"teacher_logits must .*got"):
        functional.scaffold_mask(teacher, top_k)


# ---- the scheduler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be >= 1, got 0"),
        ({"epochs": -3}, ValueError, "epochs must be >= 1, got -3"),
        ({"epochs": 30.0}, TypeError, "epochs must be an int, got float 30.0"),
        ({"epochs": True}, TypeError, "epochs must be an int, got bool True"),
        ({"epochs": "30"}, TypeError, "epochs must be an int, got str '30'"),
        ({"multiplier": (50.0, 0.1)}, ValueError, "multiplier must be (smallest, largest), got (50.0, 0.1)"),
        ({"multiplier": (-0.1, 50.0)}, ValueError, "multiplier must be >= 0, got -0.1"),
        ({"multiplier": (0.1, math.inf)}, ValueError, "multiplier must be finite, got inf"),
        ({"multiplier": (math.nan, 50.0)}, ValueError, "multiplier must be >= 0, got nan"),
        ({"multiplier": 50.0}, ValueError, "multiplier must be two numbers, got 50.0"),
        ({"multiplier": (50.0,)}, ValueError, "multiplier must be two numbers, got (50.0,)"),
        ({"multiplier": (0.1, 1.0, 50.0)}, ValueError, "multiplier must be two numbers, got (0.1, 1.0, 50.0)"),
        ({"multiplier": ("a", "b")}, TypeError, "multiplier must be a number, got str 'a'"),
        ({"period": 0}, ValueError, "period must be >= 1, got 0"),
        ({"period": 2.5}, TypeError, "period must be an int, got float 2.5"),
        ({"budget_period": 0}, ValueError, "budget_period must be >= 1, got 0"),
        ({"budget_period": 2.5}, TypeError, "budget_period must be an int, got float 2.5"),
        ({"budget": (0.1, 0.5)}, ValueError, "budget must be a number or (upper, lower), got (0.1, 0.5)"),
        ({"budget": -0.3}, ValueError, "budget must be >= 0, got -0.3"),
        ({"budget": (0.5, -0.1)}, ValueError, "budget must be >= 0, got -0.1"),
        ({"budget": (0.5,)}, ValueError, "budget must be two numbers, got (0.5,)"),
        ({"budget": math.nan}, ValueError, "budget must be >= 0, got nan"),
        ({"budget": "0.3"}, TypeError, "budget must be a number, got str '0.3'"),
        ({"budget_decay": 0.0}, ValueError, "budget_decay must be > 0, got 0.0"),
        ({"budget_decay": -0.5}, ValueError, "budget_decay must be > 0, got -0.5"),
        ({"budget_decay": 1.1}, ValueError, "budget_decay must be <= 1, got 1.1"),
        ({"budget_decay": math.nan}, ValueError, "budget_decay must be > 0, got nan"),
        ({"rule": "linear"}, ValueError, "rule must be one of ['cosine', 'adaptive', 'ascent'], got 'linear'"),
        ({"rule": None}, ValueError, "rule must be one of ['cosine', 'adaptive', 'ascent'], got None"),
        ({"ascent_rate": 0}, ValueError, "ascent_rate must be > 0, got 0"),
        ({"ascent_rate": math.inf}, ValueError, "ascent_rate must be finite, got inf"),
        ({"rule": "adaptive", "multiplier_cap": 49.0}, ValueError, "multiplier_cap must be >= 50.0, got 49.0"),
        ({"multiplier_cap": "high"}, TypeError, "multiplier_cap must be a number, got str 'high'"),
    ],
)
def test_bad_setting_passed_the_scheduler(settings, error, message):
    disk = make_loss()
    before = copy.deepcopy(disk.state_dict())
    with refuses(error, message):
        DualScheduler(disk, **{"epochs": 8} | settings)
    torch.testing.assert_close(disk.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("loss", "got"), [(nn.CrossEntropyLoss(), "CrossEntropyLoss"), (nn.Sequential(make_loss()), "Sequential")]
)
def test_another_loss_passed_the_scheduler(loss, got):
    with refuses(TypeError, "loss must be a DiSKLoss (not a wrapper around it)", f"got {got}"):
        DualScheduler(loss, epochs=8)


@pytest.mark.parametrize(
    ("epoch", "error", "message"),
    [
        (-1, ValueError, "epoch must be >= 0, got -1"),
        (1.5, TypeError, "epoch must be an int, got float 1.5"),
        (True, TypeError, "epoch must be an int, got bool True"),
        (None, TypeError, "epoch must be an int, got NoneType"),
    ],
)
def test_bad_epoch_passed_the_schedule(epoch, error, message):
    with refuses(error, message):
        DualScheduler(make_loss(), epochs=8)(epoch)


def test_an_epoch_was_asked_for_that_depends_on_the_run():
    with refuses(RuntimeError, "under rule='ascent' the multiplier depends on the run: read loss.multiplier instead"):
        DualScheduler(make_loss(), epochs=8, rule="ascent")(3)


@pytest.mark.parametrize("rule", ["adaptive", "ascent"])
def test_step_passed_without_a_batch_to_judge(rule):
    disk = make_loss()
    dual = DualScheduler(disk, epochs=8, rule=rule)
    for _ in range(2):
        with refuses(RuntimeError, f"step() with rule='{rule}' needs a training batch since the last step, got none"):
            dual.step()
        assert dual.epoch == 0
        disk.eval()(torch.randn(N, C), torch.randn(N, C), INDICES)  # evaluation does not count
    disk.train()(torch.randn(N, C), torch.randn(N, C), INDICES)
    dual.step()
    with refuses(RuntimeError, "needs a training batch since the last step, got none"):
        dual.step()
    assert dual.epoch == 1


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["epoch", "multiplier_max", "ascent_multiplier", "warned"])
def test_scheduler_state_with_a_missing_entry_passed(missing):
    dual = DualScheduler(make_loss(), epochs=8)
    state = dual.state_dict()
    del state[missing]
    expected, got = str(sorted(dual.state_dict())), str(sorted(state))
    with refuses(RuntimeError, f"expected a state with {expected}, got {got}"):
        dual.load_state_dict(state)
    with refuses(RuntimeError, "expected a state with", "got []"):
        dual.load_state_dict({})


def test_scheduler_state_with_an_unknown_entry_passed():
    dual = DualScheduler(make_loss(), epochs=8)
    with refuses(RuntimeError, "expected a state with", "'last_lr'"):
        dual.load_state_dict(dual.state_dict() | {"last_lr": 0.1})


@pytest.mark.parametrize("missing", ["multiplier", "budget", "epoch_statistics", "guide.mlp.0.weight"])
def test_checkpoint_of_the_loss_with_a_missing_entry_passed(missing):
    state = make_loss().state_dict()
    del state[missing]
    with refuses(RuntimeError, "Missing key(s) in state_dict", missing):
        make_loss().load_state_dict(state)


def test_checkpoint_without_the_fitted_temperature_passed_a_loss_that_fits():
    with refuses(RuntimeError, "Missing key(s) in state_dict", "fitted_student_temperature"):
        make_loss(student_temperature="fit").load_state_dict(make_loss().state_dict())


@pytest.mark.parametrize(
    ("saved", "loaded", "came", "expected"),
    [
        (GuideHead(100), GuideHead(10), "[64, 100]", "[64, 10]"),
        (GuideHead(C, D), GuideHead(C), "[64, 8]", "[64, 5]"),
        (GuideHead(C), GuideHead(C, D), "[64, 5]", "[64, 8]"),
        (GuideHead(C, hidden_dims=(32, 128)), GuideHead(C), "[32, 5]", "[64, 5]"),
    ],
    ids=["classes", "with features into without", "without features into with", "hidden"],
)
def test_checkpoint_of_another_guide_passed(saved, loaded, came, expected):
    message = re.escape(came) + r"[\s\S]*" + re.escape(expected)
    with pytest.raises(RuntimeError, match=r"size mismatch for guide\.mlp\.0\.weight[\s\S]*" + message):
        DiSKLoss(loaded).load_state_dict(DiSKLoss(saved).state_dict())


# ---- the library's own manners ---------------------------------------------------------------------------------------

SOURCES = sorted(pathlib.Path(disk_plugin.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_library_asserts_or_prints(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Assert), f"assert in {path}:{node.lineno}"
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not is_print, f"print in {path}:{node.lineno}"


def test_the_sources_were_found():
    assert {"loss.py", "guide.py", "schedule.py", "objective.py", "scaffold.py"} <= {path.name for path in SOURCES}


@pytest.mark.parametrize(
    ("field", "value"), [("teacher_target", "x"), ("budget_label", "foo"), ("budget_denominator", "bar")]
)
def test_a_hand_made_variant_with_an_unknown_choice_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"variant\.{field} must be one of \[.*\], got '{value}'"):
        DiSKLoss(GuideHead(5), variant=VARIANTS["paper"]._replace(**{field: value}))


def test_a_variant_of_another_type_is_refused():
    with pytest.raises(ValueError, match=r"variant must be one of \[.*\] or a Variant, got \['paper'\]"):
        DiSKLoss(GuideHead(5), variant=["paper"])


def test_nan_is_not_hidden_by_the_optimal_guide():
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    teacher[2, 1] = torch.nan
    found = functional.optimal_guide(student, teacher, torch.arange(4), multiplier=5.0)
    assert found.isnan().tolist() == [False, False, True, False]


# ---- numpy's numbers -------------------------------------------------------------------------------------------------


def test_numpys_numbers_pass_wherever_pythons_do():
    disk = DiSKLoss(
        GuideHead(np.int64(5), np.int32(3), hidden_dims=(np.int64(4),)),
        ce_weight=np.float32(0.25),
        temperature=np.float64(2),
        top_k=np.int32(2),
        multiplier=np.int64(3),
        budget=np.float32(0.5),
        ignore_index=np.int64(255),
    )
    student, teacher, features, target = torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 3), torch.arange(4)
    target[0] = 255
    plain = DiSKLoss(disk.guide, ce_weight=0.25, temperature=2.0, top_k=2, multiplier=3.0, budget=0.5, ignore_index=255)
    torch.testing.assert_close(disk(student, teacher, target, features), plain(student, teacher, target, features))
    disk = DiSKLoss(disk.guide, discount=None, ignore_index=np.int64(255))
    dual = DualScheduler(disk, epochs=np.int64(8), multiplier=(np.float32(1), np.float64(2)), period=np.int64(4))
    assert dual(np.int64(8))[0] == 2.0
    for rule in ("ascent", "adaptive"):
        how = {"ascent_rate": np.float64(0.5), "multiplier_cap": np.float64(60), "budget_decay": np.float32(1)}
        plain = DiSKLoss(disk.guide, discount=None, ignore_index=255)
        dual = DualScheduler(plain, epochs=8, rule=rule, **how)
        plain(student, teacher, target, features)
        dual.step()
        assert {type(value) for value in dual.state_dict().values()} <= {int, float, list, bool}
    half = DiSKLoss(GuideHead(5), temperature=np.float16(4), ce_weight=np.float16(0.25))
    assert (type(half.temperature), type(half.ce_weight)) == (float, float)
    optimizer = torch.optim.SGD(disk.guide.parameters(), lr=0.1)
    replay = GuideReplay(disk, optimizer, capacity=np.int64(3), batch_size=np.int64(2), seed=np.int64(1))
    replay.student_loss(student, teacher, target, features)
    assert len(replay.train_guide(passes=np.int64(2))) == 2
    record = SampleRecord(ignore_index=np.int64(255))
    terms = disk.terms(student, teacher, target, features, reduction="none")
    record.add(torch.arange(4), np.int64(0), terms, target=target)
    assert len(record.state_dict()["index"]) == 3
    views = SeededViews(TensorDataset(student), np.int64(2), seed=np.int64(7))
    assert json.dumps([views.views, views.seed]) == "[2, 7]"
    assert json.dumps(with_features(nn.Sequential(nn.Linear(np.int64(4), 5))).feature_dim) == "4"


@pytest.mark.parametrize("value", [1.0, np.float64(1), True, "1"])
def test_what_is_no_integer_is_refused_as_ignore_index(value):
    with pytest.raises(TypeError, match="ignore_index must be an int, got"):
        DiSKLoss(GuideHead(5), ignore_index=value)
    with pytest.raises(TypeError, match="ignore_index must be an int, got"):
        SampleRecord(ignore_index=value)
