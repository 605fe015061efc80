"""The contract of DiSKLoss: module == function, compile, copies, state, resume, and a guide that lives."""

import copy
import inspect
import io
import os
import re
import shutil

import digits
import pytest
import torch
from torch import nn

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, _checks, functional, presets
from disk_plugin.replay import GuideReplay
from disk_plugin.schedule import estimate_budget
from disk_plugin.taps import FeatureTap, with_features
from disk_plugin.variants import VARIANTS

PUBLIC = (
    DiSKLoss,
    GuideHead,
    DualScheduler,
    GuideReplay,
    with_features,
    estimate_budget,
    functional.disk_terms,
    functional.kd_loss,
    functional.scaffolded_kl,
    functional.usage,
    functional.fit_student_temperature,
    functional.student_temperature_step,
    functional.optimal_guide,
    functional.scaffold_mask,
)


def batch(n=6, c=5, d=3):
    return torch.randn(n, c, requires_grad=True), torch.randn(n, c), torch.randint(c, (n,)), torch.randn(n, d)


def make_loss(**settings):
    """The paper's form, a budget in nats; the default's tests are in test_level.py."""
    return DiSKLoss(GuideHead(5, 3), **{"discount": None, "temperature": 4.0, **settings})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_module_equals_function(variant, reduction):
    settings = {
        "ce_weight": 0.3,
        "distill_weight": 0.6,
        "temperature": 2.0,
        "student_temperature": 3.0,
        "top_k": 2,
        "multiplier": 7.0,
        "budget": 0.1,
        "variant": variant,
        "guide_gradient_scale": 0.2,
        "ignore_index": 1,
    }
    student, teacher, target, features = batch()
    disk, weight = make_loss(**settings), torch.rand(6)
    found = disk.terms(student, teacher, target, features, sample_weight=weight, reduction=reduction)
    guide_logits = disk.guide(teacher, features)
    expected = functional.disk_terms(
        student, teacher, target, guide_logits, sample_weight=weight, reduction=reduction, **settings
    )
    for name in found._fields:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(
        disk(student, teacher, target, features, sample_weight=weight),
        disk.terms(student, teacher, target, features, sample_weight=weight).loss,
    )


def test_module_and_function_share_the_defaults_that_are_not_chosen_by_experiment():
    module, function = (inspect.signature(x).parameters for x in (DiSKLoss, functional.disk_terms))
    chosen = {"ce_weight", "distill_weight", "temperature", "multiplier", "budget"}  # the function's are the paper's
    for name in module.keys() & function.keys() - chosen:
        assert module[name].default == function[name].default, name
    disk = DiSKLoss(GuideHead(5), discount=None)
    assert (disk.multiplier.item(), disk.budget.item()) == (function["multiplier"].default, function["budget"].default)


SETTINGS = {
    "ce_weight": 0.7,
    "distill_weight": 0.2,
    "temperature": 1.5,
    "top_k": 2,
    "ignore_index": 1,
    "guide_gradient_scale": None,
    "variant": VARIANTS["official_cifar"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_is_assigned_later_takes_effect(name):
    disk, asked = make_loss(), make_loss(**{name: SETTINGS[name]})
    if name == "ce_weight":
        asked.distill_weight = disk.distill_weight  # which follows it in the constructor alone
    asked.guide.load_state_dict(disk.guide.state_dict())
    setattr(disk, name, SETTINGS[name])
    student, teacher, target, features = batch()
    found, expected = (
        torch.autograd.grad(each(student, teacher, target, features), [student, *each.parameters()])
        for each in (disk, asked)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", [{}, {"discount": 0.3}])
def test_settings_are_validated_once_not_in_each_forward(monkeypatch, form):
    disk, seen = make_loss(top_k=2, variant="official_imagenet", **form), []
    for check in ("number", "integer"):
        monkeypatch.setattr(_checks, check, lambda name, value, **bounds: seen.append(name))
    disk(*batch())
    assert seen == []


def test_the_divergence_weighs_what_the_cross_entropy_leaves():
    assert make_loss().distill_weight == 1.0
    assert make_loss(ce_weight=0.3).distill_weight == 0.7
    assert make_loss(ce_weight=1.5).distill_weight == 0.0
    assert make_loss(ce_weight=0.3, distill_weight=0.9).distill_weight == 0.9


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)
def test_docstring_names_every_argument_and_no_other(public):
    arguments = [name for name in inspect.signature(public).parameters if name != "self"]
    block = re.search(r"Args:\n(.*?)\n\n", inspect.getdoc(public) + "\n\n", re.DOTALL).group(1)
    assert re.findall(r"^ {4}(\w+):", block, re.MULTILINE) == arguments


@pytest.mark.parametrize("settings", [{}, {"student_temperature": "fit"}, {"variant": "official_cifar", "top_k": 2}])
def test_compiles_without_graph_breaks(settings):
    torch.compiler.reset()
    disk = make_loss(**settings)
    twin = copy.deepcopy(disk)
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    for _ in range(2):
        student, teacher, target, features = batch()
        expected, found = disk(student, teacher, target, features), compiled(student, teacher, target, features)
        torch.testing.assert_close(found, expected)
        for loss, module in ((expected, disk), (found, twin)):
            module.zero_grad()
            loss.backward()
        for ours, theirs in zip(disk.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    ours, theirs = disk.state_dict(), twin.state_dict()
    # sums in float64 of what was computed in float32
    torch.testing.assert_close(ours.pop("epoch_statistics"), theirs.pop("epoch_statistics"), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch 2.13's own
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler: g++, or what CXX names"
)
def test_terms_compile_with_inductor_where_a_compiler_exists():
    torch.compiler.reset()
    disk = make_loss()
    student, teacher, target, features = batch()
    found = torch.compile(disk, fullgraph=True)(student, teacher, target, features)
    torch.testing.assert_close(found, disk(student, teacher, target, features))


def test_backward_with_an_upstream_gradient_scales_both_players():
    student, teacher, target, features = batch()
    disk = make_loss(budget=0.0)
    inputs = [student, *disk.parameters()]
    once = torch.autograd.grad(disk(student, teacher, target, features), inputs)
    thrice = torch.autograd.grad(3 * disk(student, teacher, target, features), inputs)
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * one, three)


def test_in_place_division_of_the_loss_changes_no_logged_part():
    student, teacher, target, features = batch()
    terms = make_loss(budget=0.0).terms(student, teacher, target, features)
    before = [value.clone() for value in terms[1:]]
    loss = terms.loss
    loss /= 4
    for value, expected in zip(terms[1:], before, strict=True):
        assert torch.equal(value, expected)


def test_deepcopy_is_independent():
    disk = make_loss()
    twin = copy.deepcopy(disk)
    with torch.no_grad():
        twin.multiplier.fill_(3.0)
        twin.guide.mlp[0].weight.zero_()
    assert disk.multiplier.item() == 50.0
    assert disk.guide.mlp[0].weight.abs().sum() > 0


def test_dtype_moves_keep_the_objective():
    student, teacher, target, features = batch()
    disk = make_loss(budget=0.3, multiplier=0.7).double()
    loss = disk(student.double(), teacher.double(), target, features.double())
    assert loss.dtype == torch.float64
    assert disk.multiplier.item() == 0.7
    torch.testing.assert_close(disk.float()(student, teacher, target, features), loss.float())
    low = disk.to(torch.bfloat16)(student, teacher, target, features)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, loss.float(), rtol=0.02, atol=0.1)


def test_state_dict_holds_guide_and_state_only_and_loads_weights_only():
    disk = make_loss(student_temperature="fit")
    disk(*batch())
    names = {name for name in disk.state_dict() if not name.startswith("guide.")}
    assert names == {
        "multiplier",
        "budget",
        "epoch_statistics",
        "fitted_student_temperature",
        "student_temperature_moments",
    }
    file = io.BytesIO()
    torch.save(disk.state_dict(), file)
    file.seek(0)
    fresh = make_loss(student_temperature="fit")
    fresh.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(fresh.state_dict(), disk.state_dict(), rtol=0, atol=0)


def test_repr_shows_the_current_multiplier_and_budget():
    disk = DiSKLoss(GuideHead(5), budget=0.3)
    assert "multiplier=50.0, budget=0.3" in repr(disk)
    dual = DualScheduler(disk, epochs=8, multiplier=(0.1, 50.0), budget=(0.6, 0.2), period=2)
    assert "multiplier=0.1, budget=0.6" in repr(disk)
    dual.step()
    assert "multiplier=25.05, budget=0.4" in repr(disk)
    with torch.device("meta"):
        assert "budget=tensor(..., device='meta'" in repr(DiSKLoss(GuideHead(5), budget=0.3))


def test_a_number_as_student_temperature_is_a_setting_that_no_checkpoint_overrides():
    disk = make_loss(student_temperature=2.0)
    disk.load_state_dict(make_loss(student_temperature=4.0).state_dict())
    assert disk.student_temperature == 2.0


def test_fitting_happens_in_training_mode_only():
    disk = make_loss(student_temperature="fit")
    assert disk.student_temperature.item() == 4.0
    disk.eval()
    disk(*batch())
    assert disk.student_temperature.item() == 4.0
    disk.train()
    disk(*batch())
    assert disk.student_temperature.item() != 4.0


def test_fitted_temperature_follows_the_exact_fit_over_an_epoch():
    teacher = 3 * torch.randn(3000, 5)
    student = 0.5 * teacher + torch.randn(3000, 5)
    disk = DiSKLoss(GuideHead(5), student_temperature="fit", temperature=4.0)
    for index in torch.randperm(3000).split(100):
        disk(student[index], teacher[index], torch.randint(5, (100,)))
    exact = functional.fit_student_temperature(student, teacher)
    assert disk.student_temperature.item() == pytest.approx(exact.item(), rel=0.03)


class TrainingRun:
    """Student, guide, one SGD and both schedulers, on fixed data: all that a resume has to bring back."""

    def __init__(self, epochs, rule, norm):
        torch.manual_seed(1)
        self.student = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 5))
        self.disk = DiSKLoss(GuideHead(5, 3, norm=norm), student_temperature="fit", budget=0.2)
        self.dual = DualScheduler(self.disk, epochs=epochs, rule=rule, period=2, multiplier=(5.0, 50.0))
        self.optimizer = torch.optim.SGD([*self.student.parameters(), *self.disk.parameters()], lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs)
        generator = torch.Generator().manual_seed(2)
        self.x, self.teacher = torch.randn(40, 8, generator=generator), torch.randn(40, 5, generator=generator)
        self.features, self.y = torch.randn(40, 3, generator=generator), self.teacher.argmax(1)

    def parts(self):
        return {name: getattr(self, name) for name in ("student", "disk", "dual", "optimizer", "scheduler")}

    def train(self, first, last):
        for epoch in range(first, last):
            order = torch.randperm(40, generator=torch.Generator().manual_seed(epoch))
            for index in order.split(10):
                loss = self.disk(self.student(self.x[index]), self.teacher[index], self.y[index], self.features[index])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            self.scheduler.step()
            self.dual.step()


@pytest.mark.parametrize("rule", ["cosine", "adaptive", "ascent"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_training_2n_epochs_equals_n_save_fresh_objects_n_bit_for_bit(rule, norm):
    whole = TrainingRun(8, rule, norm)
    whole.train(0, 8)
    half = TrainingRun(8, rule, norm)
    half.train(0, 4)
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in half.parts().items()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(99)
    resumed = TrainingRun(8, rule, norm)
    for name, part in resumed.parts().items():
        part.load_state_dict(saved[name])
    resumed.train(4, 8)
    for name, part in resumed.parts().items():
        torch.testing.assert_close(part.state_dict(), getattr(whole, name).state_dict(), rtol=0, atol=0)


@pytest.fixture(scope="module")
def digits_problem():
    torch.set_num_threads(1)
    train = digits.splits()["train"]
    teacher = with_features(digits.trained_teacher(train, 30))
    with torch.no_grad():
        return train, *teacher(train.x)


def guide_after_two_periods(problem, seed, warns, **settings):
    """One SGD (lr .1, momentum .9), multiplier .1 to 50 in two periods; usage / budget and std of g at the end."""
    train, logits, features = problem
    student = digits.warm_student(train, 30, seed)
    torch.manual_seed(seed)
    disk = DiSKLoss(GuideHead(10, features.shape[1]), budget=0.13, **settings)
    dual = DualScheduler(disk, epochs=80, multiplier=(0.1, 50.0), period=40)

    def run():
        digits.train(
            student,
            train,
            80,
            seed,
            lambda model, x, y, i: disk(model(x), logits[i], y, features[i]),
            extra_parameters=disk.parameters(),
            after_epoch=lambda epoch: dual.step(),
        )

    if warns:
        with pytest.warns(UserWarning, match="guide is dead"):
            run()
    else:
        run()
    disk.eval()
    with torch.no_grad():
        terms = disk.terms(student(train.x), logits, train.y, features, reduction="none")
    return (terms.usage.mean() / disk.budget).item(), terms.guide.std().item()


@pytest.mark.parametrize("seed", range(3))
def test_the_guide_lives_within_its_budget_under_the_students_sgd(digits_problem, seed):
    usage, spread = guide_after_two_periods(digits_problem, seed, warns=False)
    assert 0.5 <= usage <= 2.0
    assert spread > 0.005


def test_the_plain_gradient_kills_the_guide_and_the_scheduler_says_so(digits_problem):
    usage, spread = guide_after_two_periods(digits_problem, 0, warns=True, guide_gradient_scale=None)
    assert usage > 2.0
    assert spread < 0.005


@pytest.mark.parametrize("name", ["PAPER", "OFFICIAL_CIFAR", "OFFICIAL_IMAGENET", "CIFAR100_SEARCHED"])
def test_presets_splat_into_the_constructors(name):
    preset = getattr(presets, name)
    assert set(preset) == {"guide", "loss", "dual", "recipe"}
    disk = DiSKLoss(GuideHead(30, 16, **preset["guide"]), **preset["loss"])
    dual = DualScheduler(disk, epochs=preset["recipe"].get("epochs", 90), **preset["dual"])
    assert disk.multiplier.item() == dual(0)[0] == preset["dual"]["multiplier"][0]
    student, teacher, features = torch.randn(8, 30, requires_grad=True), torch.randn(8, 30), torch.randn(8, 16)
    disk(student, teacher, torch.randint(30, (8,)), features).backward()
    assert student.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in disk.parameters())


def test_a_moving_average_of_the_student_can_teach():
    student = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    average = torch.optim.swa_utils.AveragedModel(student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    teacher: FeatureTap = with_features(average.eval())
    disk = DiSKLoss(GuideHead(5, teacher.feature_dim), ce_weight=0.5)  # else the student already is its teacher
    optimizer = torch.optim.SGD([*student.parameters(), *disk.parameters()], lr=0.1)
    x, y = torch.randn(12, 8), torch.randint(5, (12,))
    for _ in range(3):
        with torch.no_grad():
            logits, features = teacher(x)
        loss = disk(student(x), logits, y, features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(student)
    assert torch.equal(teacher(x)[0], average(x))
    assert all(parameter.grad is None for parameter in average.parameters())
    assert not torch.equal(average(x), student(x))


def test_summed_batches_and_a_step_before_backward_do_not_break_the_graph():
    disk = make_loss(student_temperature="fit", variant="official_imagenet").double()
    dual = DualScheduler(disk, epochs=8)
    inputs = [[x.double() if x.is_floating_point() else x for x in batch()] for _ in range(2)]
    loss = sum(disk(*values) for values in inputs)
    dual.step()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in disk.parameters())


def test_a_cast_of_the_loss_keeps_its_scalars_exact():
    disk = make_loss(multiplier=0.1).bfloat16()
    for _ in range(300):
        disk(*batch(8))
    assert disk.statistics().positions == 2400
    assert disk.multiplier.item() == 0.1


def test_resuming_takes_up_the_budget_that_the_saved_loss_was_built_with():
    disk = make_loss(budget=0.61)
    dual = DualScheduler(disk, epochs=8)
    dual.step()
    fresh = make_loss()
    resumed = DualScheduler(fresh, epochs=8)
    fresh.load_state_dict(disk.state_dict())
    resumed.load_state_dict(dual.state_dict())
    assert fresh.budget.item() == 0.61
    resumed.step()
    assert fresh.budget.item() == 0.61
