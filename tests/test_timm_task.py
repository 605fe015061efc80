"""``DiSKTask`` and ``DiSKSimKDTask`` in loops of one's own, with timm's tiny models."""

import copy
import pickle

import pytest
import reference
import torch
from processes import leave_group
from torch import multiprocessing as mp
from torch import nn

timm = pytest.importorskip("timm")

from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.task import LogitDistillationTask  # noqa: E402
from timm.utils import CheckpointSaver, dispatch_clip_grad  # noqa: E402

from disk_plugin import functional, presets  # noqa: E402
from disk_plugin.features import DKD, Method, Outputs  # noqa: E402
from disk_plugin.integrations.timm import DiSKSimKDTask, DiSKTask, SimKDModel  # noqa: E402
from disk_plugin.integrations.timm.method_stage import prepare_method  # noqa: E402

# a handful of steps at the smallest multiplier let momentum carry g near 1 on a few random images: no matter here
pytestmark = pytest.mark.filterwarnings("ignore:the guide is dead")

CLASSES, SIZE = 5, (3, 32, 32)
MODES = [
    {},
    {"mode": "alternating", "alternating": {"guide_passes": 1, "student_passes": 2}},
    {"mode": "alternating", "alternating": {"replay": True, "student_passes": 1}},
]
KINDS = [DiSKTask, DiSKSimKDTask]
SCALEKD = {"method": "scalekd", "teacher": "test_vit", "student": "test_vit2"}  # whose maps are 2 x 2 for these images
# a student with BatchNorm, whose last map is 1 x 1
SCALEKD_OF_MEANS = {"method": "scalekd", "teacher": "test_vit", "method_settings": {"dc_removed_weight": 0.0}}


class Hints(Method):
    """A method with layers of its own and no prediction."""

    reads = frozenset({"last", "features"})

    def __init__(self, channels):
        super().__init__()
        self.regressor = nn.Conv2d(*channels, 1)

    @classmethod
    def for_pair(cls, pair, **settings):
        return cls([models.maps["last"].shape[1] for models in (pair.student, pair.teacher)], **settings)

    def forward(self, student, teacher, target):
        found = self.regressor(student.maps["last"]).mean((2, 3))
        return {"hint": (found - teacher.maps["last"].mean((2, 3))).square().mean(1) + 0 * teacher.features.sum(1)}


def models(student="test_vit", teacher="test_resnet", classes=CLASSES):
    """A student without BatchNorm by default, so that a batch's gradient is the mean of its parts'."""
    torch.manual_seed(0)
    sized = {"img_size": 32} if "vit" in student else {}
    return timm.create_model(student, num_classes=classes, **sized), timm.create_model(teacher, num_classes=classes)


def make(kind=DiSKTask, student="test_vit", teacher="test_resnet", **settings):
    pair = models(student, teacher)
    return kind(*pair, **{"epochs": 4, "input_size": SIZE, "verbose": False, **settings})


def batch(samples=8, seed=1, soft=False):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(samples, *SIZE, generator=generator)
    if soft:
        return image, torch.rand(samples, CLASSES, generator=generator).softmax(1)
    return image, torch.randint(CLASSES, (samples,), generator=generator)


def gradients(task):
    """Copies of all gradients by name, of what is trained, of the method and of the guide wherever they are."""
    named = [*task.student.named_parameters(), *task.disk.guide.named_parameters("guide")]
    method = task.training_core.guided.method
    named += [] if method is None else method.named_parameters("method")
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def assert_equal(left, right, **tolerance):
    assert left.keys() == right.keys()
    assert left
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def flat(state):
    """Every tensor and number of a nested state, by path."""
    if isinstance(state, dict):
        return {f"{key}.{path}": value for key, part in state.items() for path, value in flat(part).items()}
    if isinstance(state, list | tuple):
        return flat(dict(enumerate(state)))
    return {"": state}


# ---- methods ---------------------------------------------------------------------------------------------------------


def test_dkd_in_a_task_is_the_criterion_and_dkd_weighed_by_the_guide():
    task = make(method="dkd", method_settings={"beta": 2.0}, distill_loss_weight=0.4, weight="one_minus_discount")
    task.begin_epoch(19)  # its warm-up is over
    image, target = batch()
    task.eval()
    found = task(image, target)
    logits, (teacher, *_) = task.student(image), task._teacher(image)
    losses = DKD(beta=2.0)(Outputs(logits), Outputs(teacher), target)
    w = 1 - task.disk.terms(logits, teacher, target, task._teacher(image)[1], reduction="none").discount
    torch.testing.assert_close(found["kd_loss"], (w * losses["dkd"]).mean())  # no cross-entropy of its own
    expected = nn.functional.cross_entropy(logits, target) + 0.4 * (w * losses["dkd"]).mean()
    terms = task.training_core.guided.disk.terms(logits, teacher, target, task._teacher(image)[1])
    torch.testing.assert_close(found["loss"], expected + terms.guide_loss)


def test_a_methods_layers_are_trained_clipped_and_kept_in_the_tasks_state_and_the_student_stays_bare():
    task = make(method=Hints)
    names = dict(task.get_trainable_module().named_parameters())
    assert "method.regressor.weight" in names
    clipped = {id(parameter) for parameter in task.get_clip_parameters()}
    assert id(names["method.regressor.weight"]) in clipped
    before = names["method.regressor.weight"].clone()
    step(task, optimizer_of(task))
    assert not torch.equal(names["method.regressor.weight"], before)
    state = task.get_checkpoint_state()
    assert state["task_state"].keys() == {"disk", "method", "dual"}
    assert state["state_dict"].keys() == models()[0].state_dict().keys()


def test_scalekd_is_a_methods_losses_and_disks_own_of_the_logits_and_the_student_stays_bare():
    task = make(**SCALEKD, method_settings={"norm": "layer"}, distill_loss_weight=0.4)
    image, target = batch()
    task.eval()  # or BatchNorm's statistics differ
    found = task(image, target)
    method, (_, _, shown) = task.training_core.guided.method, task._teacher(image)
    student = task._parts.student(task.student, image)
    assert {name: tuple(each.shape[2:]) for name, each in student.maps.items()} == {
        "before_last": (2, 2),
        "last": (2, 2),
    }
    losses = method(student, shown, target)
    terms = task.disk.terms(student.logits, shown.logits, target, task._teacher(image)[1], reduction="none")
    features = (1 - terms.guide) * sum(losses[name] for name in ("proxy", "main", "proxy_no_dc", "main_no_dc"))
    torch.testing.assert_close(found["kd_loss"], features.mean(), rtol=1e-4, atol=1e-5)
    means = terms.mean()
    expected = nn.functional.cross_entropy(student.logits, target) + 0.4 * features.mean()
    expected = expected + means.student_loss + means.guide_loss  # of the logits, each player's own
    torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=1e-4)
    state = task.get_checkpoint_state()
    assert state["state_dict"].keys() == models("test_vit2")[0].state_dict().keys()
    assert not any("tail" in key for key in state["task_state"]["method"])


def test_scalekds_teacher_is_as_it_was_after_steps_under_the_compiler_and_autocast():
    task = make(**SCALEKD)
    teacher = copy.deepcopy(task.teacher.state_dict())
    optimizer = optimizer_of(task)
    task.compile(backend="eager")
    for dtype in (torch.bfloat16, torch.float32):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            found = task(*batch())
        assert found["loss"].dtype == torch.float32
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        assert all(parameter.grad is not None for parameter in task.training_core.guided.method.trainable_parameters())
    assert all(torch.equal(value, teacher[key]) for key, value in task.teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in task.teacher.parameters())
    assert not any(module.training for module in task.teacher.modules())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"method": "scalekd", "teacher": "test_efficientnet"},
            ValueError,
            "no tail found in EfficientNet: .* A tail works for timm's Swin",
        ),
        ({"method": "scalekd"}, ValueError, "the teacher's final map has size 1 x 1, .* set dc_removed_weight=0"),
        (
            SCALEKD | {"method_settings": {"main_heads": 7}},
            ValueError,
            r"main_heads must divide the teacher's width 64, one of \[1, 2, 4, .*, got 7",
        ),
        ({"method": "dkdd"}, ValueError, r"method must be one of \[.*'dkd', .*\], a Method class .* got 'dkdd'"),
        ({"method": 3}, TypeError, "method must be a name, a Method class or a Method, got int 3"),
        ({"method": DKD(), "method_settings": {"beta": 1.0}}, ValueError, "are for a name or a class, got a built"),
        ({"method": "dkd", "method_settings": {"gamma": 1.0}}, TypeError, "gamma"),
        ({"label_smoothing": 0.1}, TypeError, r"unknown settings \['label_smoothing'\]"),
    ],
)
def test_methods_that_cannot_be_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)


# ---- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("variant", ["paper", "official_imagenet"])
def test_the_loss_is_the_hosts_criterion_plus_scaffold_and_budget_of_the_reference(soft, variant):
    criterion = SoftTargetCrossEntropy() if soft else LabelSmoothingCrossEntropy(0.2)
    weights = {"task_loss_weight": 0.7, "distill_loss_weight": 0.4}
    task = make(criterion=criterion, temperature=3.0, top_k=3, variant=variant, budget=0.2, **weights)
    image, target = batch(soft=soft)
    result = task(image, target)
    with torch.no_grad():
        student_logits = task.student(image)
        teacher_map = task.teacher.model.forward_features(image)
        teacher_logits = task.teacher.model(image)
        guide_logits = task.disk.guide(teacher_logits, task.teacher.model.forward_head(teacher_map, pre_logits=True))
        expected = reference.disk(
            student_logits.double().tolist(),
            teacher_logits.double().tolist(),
            (target.argmax(1) if soft else target).tolist(),
            guide_logits.double().tolist(),
            variant=variant,
            ce_weight=0.0,
            distill_weight=0.4,
            temperature=3.0,
            student_temperature=3.0,
            top_k=3,
            multiplier=float(task.disk.multiplier),
            budget=0.2,
        )
        task_loss = criterion(student_logits, target).item()
    assert result["task_loss"].item() == pytest.approx(task_loss, rel=1e-5)
    assert result["loss"].item() == pytest.approx(0.7 * task_loss + expected["loss"], rel=1e-4)
    assert result["usage"].item() == pytest.approx(expected["usage"], rel=1e-4)
    assert result["kd_loss"].item() == pytest.approx(expected["distill"], rel=1e-4)
    assert result["logged_loss"].item() == pytest.approx(0.7 * task_loss + expected["logged_loss"], rel=1e-4)
    assert task.end_epoch()["logged_loss"] == pytest.approx(result["logged_loss"].item(), rel=1e-5)
    torch.testing.assert_close(result["output"].detach(), student_logits)


@pytest.mark.parametrize("weights", [{}, {"task_loss_weight": 0.3}, {"distill_loss_weight": 2.0}])
def test_without_a_guide_it_is_the_hosts_own_logit_distillation(weights):
    task = make(temperature=2.0, dual={"multiplier": (0.0, 0.0)}, **weights)
    with torch.no_grad():
        task.disk.guide.mlp[-1].weight.zero_()
        task.disk.guide.mlp[-1].bias.fill_(-200.0)  # g = 0 in float32
    hosts = LogitDistillationTask(*models(), temperature=2.0, verbose=False, **weights)
    image, target = batch()
    for each in (task, hosts):
        each.teacher.eval()
        each(image, target)["loss"].backward()
    torch.testing.assert_close(task(image, target)["loss"], hosts(image, target)["loss"], rtol=1e-5, atol=1e-4)
    own = {name: parameter.grad for name, parameter in task.student.named_parameters()}
    theirs = {name: parameter.grad for name, parameter in hosts.trainable_module.named_parameters()}
    assert_equal(own, theirs, rtol=1e-4, atol=1e-6)


def test_a_presets_loss_splats_into_the_task():
    task = make(**presets.OFFICIAL_IMAGENET["loss"])
    assert (task.task_loss_weight, task.distill_loss_weight, task.temperature) == (0.5, 0.5, 1.0)
    assert (task.disk.top_k, task.disk.variant.scaffold_label, task.disk.ce_weight) == (20, True, 0.0)


def test_simkd_with_uniform_weights_and_no_task_loss_is_the_mean_square_of_the_maps():
    task = make(
        DiSKSimKDTask, "test_efficientnet", feature_weight="uniform", task_loss_weight=0.0, distill_loss_weight=2.0
    )
    image, target = batch()
    task.trainable_module.eval()
    model, teacher = task.student, task.teacher.model
    task(image, target)["loss"].backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    student_map = model.simkd.project(model.student.forward_features(image))
    with torch.no_grad():
        teachers_image = task.teacher.normalize_input(image, task.student_mean, task.student_std)
        assert not torch.equal(teachers_image, image)  # the two were built for other means
        teacher_map = teacher.forward_features(teachers_image)
        teacher_map = nn.functional.adaptive_avg_pool2d(teacher_map, student_map.shape[2:])
    (2.0 * nn.functional.mse_loss(student_map, teacher_map)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert own.keys() == expected.keys()
    # by length: single entries are rounding
    assert all((own[name] - expected[name]).norm() <= 1e-4 * expected[name].norm() for name in own)
    assert any(name.startswith("simkd.projector") for name in own)


def test_simkd_weighs_samples_by_the_guide():
    uniform = make(DiSKSimKDTask, "test_efficientnet", feature_weight="uniform")(*batch())["kd_loss"]
    weighed = make(DiSKSimKDTask, "test_efficientnet")(*batch())["kd_loss"]
    assert 0 < weighed < uniform


def test_a_host_that_divides_the_loss_in_place_changes_nothing_that_is_logged():
    task = make()
    result = task(*batch())
    before = {name: value.clone() for name, value in result.items() if name != "loss"}
    result["loss"] /= 4
    assert_equal({name: value for name, value in result.items() if name != "loss"}, before)
    logged = {"task_loss", "kd_loss", "usage", "guide", "discount"}
    assert logged < set(before)
    assert not any(result[name].requires_grad for name in logged)


@pytest.mark.parametrize("kind", KINDS)
def test_under_bfloat16_autocast_the_loss_is_a_finite_float32_close_to_the_full_one(kind):
    task = make(kind)
    full = task(*batch())["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        half = task(*batch())["loss"]
    half.backward()
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=0.05)
    assert all(gradient.isfinite().all() for gradient in gradients(task).values())


def test_a_bfloat16_model_trains_with_a_float32_guide():
    student, teacher = (model.to(torch.bfloat16) for model in models())
    task = DiSKTask(student, teacher, epochs=2, input_size=SIZE, dtype=torch.bfloat16, verbose=False)
    image, target = batch()
    task(image.bfloat16(), target)["loss"].backward()
    assert {p.dtype for p in task.disk.guide.parameters()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients(task).values())


@pytest.mark.parametrize("budget", [0.0, 100.0])
def test_accumulation_gives_the_full_batchs_gradient_where_all_micro_batches_agree(budget):
    accumulated, whole = make(budget=budget), make(budget=budget)
    image, target = batch(8)
    whole(image, target)["loss"].backward()
    for part in (slice(0, 4), slice(4, 8)):
        loss = accumulated(image[part], target[part])["loss"]
        loss /= 2
        loss.backward()
    assert_equal(gradients(accumulated), gradients(whole), rtol=1e-3, atol=1e-6)


def test_accumulation_differs_where_micro_batches_disagree_about_the_budget_as_documented():
    image, target = batch(8)
    spent = [make(discount=None)(image[part], target[part])["usage"].item() for part in (slice(0, 4), slice(4, 8))]
    budget = sum(spent) / 2 * 1.0001  # the whole batch keeps to it, one half does not
    accumulated, whole = make(budget=budget), make(budget=budget)
    whole(image, target)["loss"].backward()
    for part in (slice(0, 4), slice(4, 8)):
        (accumulated(image[part], target[part])["loss"] / 2).backward()
    theirs, ours = gradients(whole), gradients(accumulated)
    students = {name for name in theirs if not name.startswith("guide.")}
    assert_equal({n: ours[n] for n in students}, {n: theirs[n] for n in students}, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(ours["guide.mlp.0.weight"], theirs["guide.mlp.0.weight"], rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_gives_the_same_loss_and_gradients(kind):
    plain, compiled = make(kind, "test_efficientnet"), make(kind, "test_efficientnet")
    compiled.compile(backend="aot_eager")
    losses = []
    for task in (plain, compiled):
        losses.append(task(*batch())["loss"])
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert_equal(gradients(compiled), gradients(plain), rtol=1e-3, atol=1e-5)
    image, _ = batch()
    plain.get_eval_model().eval(), compiled.get_eval_model().eval()
    torch.testing.assert_close(compiled.get_eval_model()(image), plain.get_eval_model()(image), rtol=1e-4, atol=1e-4)
    assert compiled.get_checkpoint_state()["state_dict"].keys() == plain.get_checkpoint_state()["state_dict"].keys()


# ---- what the host sees ----------------------------------------------------------------------------------------------


def step(task, optimizer, seed=1):
    optimizer.zero_grad()
    result = task(*batch(seed=seed))
    result["loss"].backward()
    optimizer.step()
    return result


def optimizer_of(task, **settings):
    return create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.05, momentum=0.9, **settings)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.05}, {"weight_decay": 0.05, "layer_decay": 0.7}])
def test_the_hosts_optimizer_moves_guide_and_student_and_leaves_the_teacher(settings):
    task = make()
    before = copy.deepcopy(task.state_dict())
    step(task, optimizer_of(task, **settings))
    after = task.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("disk.guide") for name in moved)
    assert any(name.startswith("trainable_module.student") for name in moved)
    assert not any(name.startswith("teacher") for name in moved)


@pytest.mark.parametrize("mode", ["joint", "alternating"])
def test_validation_ema_and_checkpoints_know_the_bare_student_alone(mode, tmp_path):
    student, teacher = models()
    keys, names = set(student.state_dict()), [name for name, _ in student.named_parameters()]
    task = DiSKTask(student, teacher, epochs=2, mode=mode, input_size=SIZE, verbose=False)
    optimizer = optimizer_of(task, weight_decay=0.1)
    task.setup_ema(decay=0.5)
    for update in (1, 2, 3):
        step(task, optimizer, seed=update)
        task.update_ema(update)
    assert task.get_eval_model() is student
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, checkpoint_dir=str(tmp_path), task=task)
    saver.save_checkpoint(0, metric=1.0)
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    assert set(saved["state_dict"]) == set(saved["state_dict_ema"]) == keys
    assert "task_state_ema" not in saved
    fresh = models()[0]
    fresh.load_state_dict(saved["state_dict_ema"])
    averaged, last = fresh.state_dict(), saved["state_dict"]
    assert all(averaged[name].isfinite().all() for name in names)
    assert any(not torch.equal(averaged[name], last[name]) for name in names)
    assert not any("teacher" in path for path in flat(saved["task_state"]))
    assert all(
        isinstance(value, torch.Tensor | float | int) or value is None for value in flat(saved["task_state"]).values()
    )


def test_simkd_validates_and_saves_the_model_that_predicts():
    task = make(DiSKSimKDTask, "test_efficientnet")
    step(task, optimizer_of(task))
    model = task.get_eval_model()
    assert isinstance(model, SimKDModel)
    student, teacher = models("test_efficientnet")
    rebuilt = SimKDModel(student, teacher, torch.randn(1, *SIZE))
    rebuilt.load_state_dict(task.get_checkpoint_state()["state_dict"])
    image, _ = batch()
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.eval()(image), model.eval()(image))
    head = sum(parameter.numel() for parameter in model.simkd.classifier.parameters())
    assert head == sum(parameter.numel() for parameter in teacher.get_classifier().parameters())


def test_the_teacher_stays_frozen_and_in_evaluation_mode():
    task = make()
    task.train()
    assert not task.teacher.model.training
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())
    assert task.trainable_module.training


def test_building_the_task_leaves_the_hosts_random_numbers_alone():
    for kind in KINDS:
        pair = models()
        torch.manual_seed(7)
        expected = torch.randn(3)
        torch.manual_seed(7)
        kind(*pair, epochs=2, input_size=SIZE, verbose=False)
        torch.testing.assert_close(torch.randn(3), expected, rtol=0, atol=0)


def norm(parameters):
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_clipping_covers_the_guide_and_the_guide_cannot_starve_the_student(scale):
    task = make(guide_gradient_scale=None, dual={"multiplier": (50.0, 50.0)}, budget=0.0)
    clipped = task.get_clip_parameters()  # the host asks before it goes backward
    task(*batch())["loss"].backward()
    guide, student = list(task.disk.guide.parameters()), list(task.student.parameters())
    for parameter in guide:
        parameter.grad *= scale
    student_norm, guide_norm = norm(student), norm(guide)
    dispatch_clip_grad(clipped, value=0.1)
    assert norm([*guide, *student]) == pytest.approx(0.1, rel=1e-3)
    assert norm(guide) / norm(student) == pytest.approx(min(1.0, (guide_norm / student_norm).item()), rel=1e-3)
    assert norm(student) >= 0.1 / 2**0.5 * 0.999
    assert {id(p) for p in task.get_clip_parameters()} == {id(p) for p in [*guide, *student]}


# ---- resuming --------------------------------------------------------------------------------------------------------


def epoch_of(task, optimizer, epoch, ema=False):
    task.begin_epoch(epoch)
    loader = [batch(seed=10 * epoch + index) for index in range(3)]
    prepare_method(task, loader, progress=False)
    task.run_guide_passes(loader)
    task.get_trainable_module().train()
    torch.manual_seed(epoch)  # CIFD's noise is drawn from the host's generator, as dropout is
    for index, (image, target) in enumerate(loader):
        optimizer.zero_grad()
        task(image, target)["loss"].backward()
        optimizer.step()
        task.update_ema(3 * epoch + index + 1)
    return task.end_epoch()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DiSKTask, {"student_temperature": "fit", "dual": {"budget": (0.5, 0.2), "multiplier": (0.1, 5.0)}}),
        (DiSKTask, {"mode": "alternating", "alternating": {"guide_passes": 1, "student_passes": 2}}),
        (DiSKTask, {"mode": "alternating", "alternating": {"replay": True, "student_passes": 1}}),
        (DiSKTask, {"dual": {"rule": "ascent", "multiplier": (0.0, 9.0)}}),
        (DiSKSimKDTask, {"mode": "alternating", "alternating": {"guide_warmup_passes": 1, "guide_opt": "adam"}}),
        (DiSKSimKDTask, {}),
        *[
            (DiSKTask, {**how, **method, "weight": "one_minus_discount"})
            for method in (*({"method": each} for each in ("simkd", "dkd", "cifd", Hints)), SCALEKD, SCALEKD_OF_MEANS)
            for how in MODES
        ],
    ],
)
@pytest.mark.filterwarnings("ignore:the module with R|the bottleneck.s noise")  # of CIFD, on a few images
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(kind, settings, tmp_path):
    def fresh():
        task = make(kind, **{"student": "test_efficientnet", **settings})
        return task, optimizer_of(task)

    def finish(task, optimizer, epochs):
        logged = [epoch_of(task, optimizer, epoch) for epoch in epochs]
        return flat({**task.get_checkpoint_state(), "ema": task.get_checkpoint_state(ema=True), "logged": logged[-1]})

    task, optimizer = fresh()
    task.setup_ema(decay=0.5)
    expected = finish(task, optimizer, range(4))
    task, optimizer = fresh()
    task.setup_ema(decay=0.5)
    finish(task, optimizer, range(2))
    state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "last")
    saved = torch.load(tmp_path / "last", weights_only=True)
    task, optimizer = fresh()
    task.load_checkpoint_state(saved["state_dict"], saved["task_state"])
    optimizer.load_state_dict(saved["optimizer"])
    task.setup_ema(decay=0.5)
    task.load_checkpoint_state(saved["state_dict_ema"], saved.get("task_state_ema"), ema=True)
    resumed = finish(task, optimizer, range(2, 4))
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        same = torch.equal(value, resumed[name]) if isinstance(value, torch.Tensor) else value == resumed[name]
        assert same or value != value, name  # NaN: the mean over right samples where there is none


def test_a_checkpoint_without_state_is_refused_unless_a_fresh_guide_is_allowed(caplog):
    student = models()[0].state_dict()
    with pytest.raises(RuntimeError, match=r"must hold DiSK's state .* got none.*--disk-allow-fresh-guide"):
        make().load_checkpoint_state(student, None)
    with pytest.raises(RuntimeError, match=r"got \['projection'\]"):
        make().load_checkpoint_state(student, {"projection": {}})
    make(allow_fresh_guide=True).load_checkpoint_state(student, None)
    assert "untrained guide" in caplog.text


def test_the_state_of_another_mode_or_guide_is_refused():
    joint, alternating = make(), make(mode="alternating")
    with pytest.raises(RuntimeError, match=r"must hold .*guide_passes.* got \['disk', 'dual'\]"):
        alternating.load_task_state(joint.get_task_state())
    with pytest.raises(RuntimeError, match="size mismatch"):
        make(guide={"hidden_dims": (8,)}).load_task_state(joint.get_task_state())


def test_the_schedule_follows_the_hosts_epoch_wherever_a_run_starts():
    task = make(epochs=6, dual={"period": 6})
    task.begin_epoch(4)
    assert float(task.disk.multiplier) == task.dual(4)[0]
    step(task, optimizer_of(task))
    means = task.end_epoch()
    assert means["multiplier"] == task.dual(4)[0]
    assert float(task.disk.multiplier) == task.dual(5)[0]
    assert {"budget", "usage", "guide_right", "guide_wrong", "discount_right", "discount_wrong"} < set(means)


def test_in_alternating_mode_the_guide_trains_alone_and_sees_every_multiplier():
    task = make(mode="alternating", epochs=4, alternating={"guide_passes": 2, "student_passes": 2}, dual={"period": 2})
    optimizer = optimizer_of(task)
    assert not {id(p) for g in optimizer.param_groups for p in g["params"]} & {id(p) for p in task.disk.parameters()}
    seen = []
    for epoch in range(4):
        task.begin_epoch(epoch)
        loader = [batch(seed=epoch)]
        student, guide = (copy.deepcopy(module.state_dict()) for module in (task.student, task.disk.guide))
        passes = task.run_guide_passes(loader)
        seen.append((passes, float(task.disk.multiplier)))
        assert all(torch.equal(value, student[name]) for name, value in task.student.state_dict().items())
        changed = any(not torch.equal(value, guide[name]) for name, value in task.disk.guide.state_dict().items())
        assert changed == bool(passes)
        guide = copy.deepcopy(task.disk.guide.state_dict())
        step(task, optimizer)
        assert all(torch.equal(value, guide[name]) for name, value in task.disk.guide.state_dict().items())
        task.end_epoch()
    assert [passes for passes, _ in seen] == [2, 0, 2, 0]
    assert seen[0][1] == seen[1][1] < seen[2][1] == seen[3][1]


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_record_the_first_guide_passes_alone_run_over_the_data(kind):
    recipe = {"guide_passes": 2, "student_passes": 2, "replay": True, "replay_batch_size": 8}
    task = make(kind, mode="alternating", epochs=6, alternating=recipe, dual={"period": 3})
    optimizer, replay, seen = optimizer_of(task), task.guide_passes.replay, []
    replay.optimizer.register_step_post_hook(lambda *_: seen.append((len(replay), float(task.disk.multiplier))))
    literal = []
    for epoch in range(4):
        task.begin_epoch(epoch)
        literal.append(task.run_guide_passes([batch(seed=epoch), batch(seed=epoch + 9)]))
        seen.clear() if epoch == 0 else None
        guide = copy.deepcopy(task.disk.guide.state_dict())
        step(task, optimizer)
        step(task, optimizer)
        assert all(torch.equal(value, guide[name]) for name, value in task.disk.guide.state_dict().items())
        student = copy.deepcopy(task.student.state_dict())
        task.end_epoch()
        assert all(torch.equal(value, student[name]) for name, value in task.student.state_dict().items())
        assert not task.disk.guide.training
    assert literal == [2, 0, 0, 0]
    # two batches of 8 recorded in the last epoch of two, two passes of two steps, under the multiplier of what follows
    assert seen == [(16, task.dual(iteration)[0]) for iteration in (1, 2) for _ in range(4)]


def test_a_recorded_epoch_whose_rest_the_host_skips_still_trains_the_guide():
    def fresh():
        return make(mode="alternating", alternating={"student_passes": 1, "replay": True})

    task = fresh()
    task.begin_epoch(0)
    task.run_guide_passes([batch()])
    step(task, optimizer_of(task))
    resumed = fresh()  # from a checkpoint in the middle of an epoch
    resumed.load_task_state(task.get_task_state())
    guide = copy.deepcopy(resumed.disk.guide.state_dict())
    resumed.begin_epoch(1)
    assert resumed.run_guide_passes([batch()]) == 0
    assert len(resumed.guide_passes.replay) == 0
    assert any(not torch.equal(value, guide[name]) for name, value in resumed.disk.guide.state_dict().items())


# ---- two processes ---------------------------------------------------------------------------------------------------


SHARED = {
    "disk": (DiSKTask, {}),
    "simkd": (DiSKSimKDTask, {}),
    "scalekd": (DiSKTask, {**SCALEKD, "method_settings": {"norm": "layer"}}),
}


def whole_and_budget(kind, mode, settings):
    """One process's result on the whole batch, with a budget about which its halves disagree."""
    image, target = batch(8)
    task = make(kind, mode=mode, **settings)
    without_batch_statistics(task)
    halves = [task(image[part], target[part])["usage"].item() for part in (slice(4), slice(4, 8))]
    budget = 0.2 * min(halves) + 0.8 * sum(halves) / 2
    assert min(halves) < budget < max(halves)
    return budget


def without_batch_statistics(task):
    """SimKD's projector normalises by its batch, which each process does on its own."""
    for module in task.student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def one_step(task, image, target, mode):
    if mode == "alternating":
        task.begin_epoch(0)
        task.run_guide_passes([(image, target)])
    task.get_trainable_module().train()
    without_batch_statistics(task)
    task(image, target)["loss"].backward()
    result = {**gradients(task), **{f"state.{k}": v.clone() for k, v in task.disk.guide.state_dict().items()}}
    optimizer_of(task).step()
    return result


def process(rank, address, kind, mode, out, settings):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    task = make(kind, mode=mode, alternating={"guide_passes": 2} if mode == "alternating" else None, **settings)
    if rank:  # what another seed would have made of it
        with torch.no_grad():
            for parameter in task.disk.guide.parameters():
                parameter.add_(1.0)
    task.prepare_distributed(device_ids=[torch.device("cpu")])
    image, target = batch(8)
    part = slice(4 * rank, 4 * rank + 4)
    result = one_step(task, image[part], target[part], mode)
    torch.save((result, task.end_epoch()), f"{out}.{rank}")
    leave_group()


@pytest.mark.parametrize("mode", ["joint", "alternating"])
@pytest.mark.parametrize("name", SHARED)
def test_two_processes_equal_one_with_the_whole_batch(name, mode, tmp_path):
    kind, settings = SHARED[name]
    settings = {**settings, "budget": whole_and_budget(kind, mode, settings)}
    single = make(kind, mode=mode, alternating={"guide_passes": 2} if mode == "alternating" else None, **settings)
    expected = one_step(single, *batch(8), mode)
    out = tmp_path / "result"
    mp.spawn(process, (str(tmp_path / "rendezvous"), kind, mode, str(out), settings), nprocs=2)
    (first, logged), (second, also_logged) = (torch.load(f"{out}.{rank}", weights_only=True) for rank in (0, 1))
    assert_equal(first, second, rtol=0, atol=0)
    assert_equal(first, expected, rtol=2e-3, atol=1e-5)
    assert logged == pytest.approx(also_logged, nan_ok=True)
    assert logged == pytest.approx(single.end_epoch(), rel=1e-3, nan_ok=True)


def test_a_guide_with_batch_statistics_is_the_same_on_both_processes_after_its_passes(tmp_path):
    out = tmp_path / "result"
    settings = {"guide": {"norm": "batch"}}
    mp.spawn(process, (str(tmp_path / "rendezvous"), DiSKTask, "alternating", str(out), settings), nprocs=2)
    (first, _), (second, _) = (torch.load(f"{out}.{rank}", weights_only=True) for rank in (0, 1))
    assert any("running_mean" in name for name in first)
    assert_equal(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["official_cifar", "official_imagenet"])
@pytest.mark.parametrize("budget", [0.0, 1e3])
def test_the_authors_denominator_counts_the_errors_of_all_parts(variant, budget):
    """Two parts with 1 and 4 errors, of which each is told the means over both."""
    student, teacher, guide = torch.randn(8, CLASSES), torch.randn(8, CLASSES), torch.randn(8)
    right = student.argmax(1)
    target = torch.where(torch.tensor([1, 1, 1, 0, 0, 0, 0, 0], dtype=torch.bool), right, (right + 1) % CLASSES)
    guide.requires_grad_()
    settings = {"variant": variant, "budget": budget, "multiplier": 2.0, "top_k": 3}
    whole = functional.disk_terms(student, teacher, target, guide, **settings)
    (expected,) = torch.autograd.grad(whole.loss, guide)
    told = iter([torch.tensor(2.5), whole.usage] * 2)
    parts = [
        functional.disk_terms(
            *(each[part] for each in (student, teacher, target, guide)), **settings, reduce_mean=lambda _: next(told)
        )
        for part in (slice(4), slice(4, 8))
    ]
    loss = (parts[0].loss + parts[1].loss) / 2
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(torch.autograd.grad(loss, guide)[0], expected)


@pytest.mark.parametrize("settings", [{"exclude_head": True}, {}])
def test_without_a_global_norm_the_guides_gradient_keeps_its_length(settings):
    task = make(guide_gradient_scale=None, dual={"multiplier": (50.0, 50.0)}, budget=0.0)
    task.clips_by_norm = bool(settings)
    task(*batch())["loss"].backward()
    guide = list(task.disk.guide.parameters())
    for parameter in guide:
        parameter.grad *= 1e4
    before = norm(guide)
    list(task.get_clip_parameters(**settings))
    assert norm(guide) == before


def test_a_fresh_guide_is_trained_before_a_resumed_student_and_the_host_draws_what_it_would_without():
    task = make(mode="alternating", alternating={"guide_warmup_passes": 2, "guide_passes": 1, "student_passes": 4})
    task.begin_epoch(2)
    torch.manual_seed(3)
    expected = torch.randperm(8)
    torch.manual_seed(3)
    dataset = torch.utils.data.TensorDataset(*batch())
    assert task.run_guide_passes(torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)) == 3
    assert torch.equal(torch.randperm(8), expected)
    task.end_epoch()
    task.begin_epoch(3)
    assert task.run_guide_passes([batch()]) == 0


def test_the_guides_optimizer_keeps_its_new_settings_on_resume_and_another_kind_is_refused():
    def guide_state(**alternating):
        return make(mode="alternating", alternating=alternating)

    state = guide_state().get_task_state()
    resumed = guide_state(guide_momentum=0.5, guide_weight_decay=0.1)
    resumed.load_task_state(state=state)
    assert {group["momentum"] for group in resumed.guide_passes.optimizer.param_groups} == {0.5}
    assert 0.1 in {group["weight_decay"] for group in resumed.guide_passes.optimizer.param_groups}
    with pytest.raises(RuntimeError, match=r"the guide's optimizer must have the settings .*betas.* got"):
        guide_state(guide_opt="adamw").load_task_state(state)


def test_an_epoch_that_was_interrupted_ends_with_what_it_showed():
    task = make(dual={"rule": "ascent", "multiplier": (0.5, 9.0)}, budget=0.0)
    task(*batch())
    task.begin_epoch(1)  # the host skips the rest of epoch 0
    assert float(task.disk.multiplier) > 0.5
    assert task.disk.statistics().positions == 0


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"criterion": BinaryCrossEntropy()}, ValueError, "cross-entropy over classes, got BinaryCrossEntropy"),
        ({"criterion": nn.BCEWithLogitsLoss()}, ValueError, "got BCEWithLogitsLoss .*sigmoid"),
        ({"criterion": JsdCrossEntropy()}, ValueError, "got JsdCrossEntropy .*the first of each image's views"),
        ({"mode": "both"}, ValueError, r"mode must be one of \['joint', 'alternating'\], got 'both'"),
        ({"multiplier": 5.0}, ValueError, "the multiplier is the schedule's"),
        ({"epochs": "3"}, TypeError, "epochs must be an int, got str"),
        ({"input_size": (3,)}, ValueError, r"input_size must be \(channels, height, width\), got \(3,\)"),
        ({"topk": 3}, TypeError, r"unknown settings \['topk'\]; known are .*top_k"),
        ({"top_k": 0}, ValueError, "top_k must be >= 1, got 0"),
        ({"ce_weight": 0.5, "task_loss_weight": 0.5}, ValueError, "the same weight"),
        ({"epochs": None, "dual": {"period": 2}}, ValueError, "needs epochs"),
        ({"alternating": {"guide_passes": 1}}, ValueError, "needs mode='alternating', got 'joint'"),
        ({"mode": "alternating", "alternating": {"guide_passes": 0}}, ValueError, "guide_passes must be >= 1, got 0"),
        ({"mode": "alternating", "alternating": {"student_passes": 1.5}}, TypeError, "an int, got float"),
        ({"mode": "alternating", "alternating": {"replay": 1}}, TypeError, "replay must be a bool, got int 1"),
        ({"mode": "alternating", "alternating": {"replay_capacity": 0}}, ValueError, "replay_capacity must be >= 1"),
        (
            {"teacher": "vit_tiny_patch16_224", "input_size": SIZE},
            ValueError,
            r"of size \(3, 32, 32\), but the teacher expects",
        ),
        ({"guide": {"norm": "group"}}, ValueError, "norm must be one of"),
        ({"loss_type": "mse"}, ValueError, "mse"),
    ],
)
def test_bad_settings_are_refused_with_what_was_expected_and_what_came(settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)


def test_models_that_do_not_fit_are_refused():
    student, _ = models()
    with pytest.raises(ValueError, match="student's 5 classes, got 7"):
        DiSKTask(student, timm.create_model("test_resnet", num_classes=7), input_size=SIZE)
    with pytest.raises(ValueError, match="has no forward_features"):
        DiSKTask(student, nn.Sequential(nn.Flatten(), nn.Linear(3072, CLASSES)), input_size=SIZE)
    with pytest.raises(ValueError, match=r"must be a timm model, got Linear without \['num_classes'"):
        DiSKTask(nn.Linear(3, CLASSES), models()[1])
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=CLASSES, img_size=32)
    distilled.set_distilled_training(True)
    with pytest.raises(ValueError, match="set_distilled_training"):
        DiSKTask(distilled, models()[1], input_size=SIZE)
    distilled.set_distilled_training(False)
    DiSKTask(distilled, models()[1], input_size=SIZE, verbose=False)(*batch())["loss"].backward()


def test_a_teacher_that_is_no_timm_model_serves_a_guide_that_reads_logits_alone():
    student, _ = models()
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3072, CLASSES))
    task = DiSKTask(student, teacher, input_size=SIZE, guide={"use_features": False}, verbose=False)
    assert task.disk.guide.feature_dim == 0
    assert task.dual is None  # no epochs: a constant multiplier
    task(*batch())["loss"].backward()


@pytest.mark.parametrize("teacher", ["test_vit", "deit_tiny_distilled_patch16_224"])
def test_simkd_refuses_teachers_whose_head_reads_a_class_token(teacher):
    student, _ = models("test_efficientnet")
    teacher = timm.create_model(teacher, num_classes=CLASSES, img_size=32)
    with pytest.raises(ValueError, match=r"ignores it \(global_pool='token', it reads a class token\)"):
        DiSKSimKDTask(student, teacher, input_size=SIZE, verbose=False)


@pytest.mark.parametrize("teacher", ["test_convnext", "test_mambaout", "test_vit2", "test_nfnet"])
@pytest.mark.parametrize("student", ["test_vit2", "test_mambaout", "test_byobnet"])
def test_simkd_reads_every_layout_of_map(student, teacher):
    sized = {"img_size": 64}
    pair = [timm.create_model(n, num_classes=CLASSES, **(sized if "vit" in n else {})) for n in (student, teacher)]
    task = DiSKSimKDTask(*pair, input_size=(3, 64, 64), verbose=False)
    task(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]))["loss"].backward()
    assert all(p.grad is not None for p in task.trainable_module.parameters() if p.requires_grad)
    teachers_map = pair[1].eval().forward_features(torch.randn(2, 3, 64, 64))
    kept = task.student.simkd.classifier(task.student.teacher_layout.to_map(teachers_map))
    torch.testing.assert_close(kept, pair[1].forward_head(teachers_map), rtol=1e-4, atol=1e-5)


def test_an_older_timm_is_refused_by_version(monkeypatch):
    from disk_plugin.integrations.timm import version

    monkeypatch.setattr(timm, "__version__", "1.0.26")
    with pytest.raises(ImportError, match=r"timm >= 1\.0\.27.*got 1\.0\.26.*pip install"):
        version.require_timm()
    for newer in ("1.0.27", "1.0.29.dev0", "1.1.0", "2.0"):
        monkeypatch.setattr(timm, "__version__", newer)
        assert version.require_timm() is timm


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_can_be_copied_and_pickled(kind):
    task = make(kind)
    expected = task(*batch())["loss"]
    for twin in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        torch.testing.assert_close(twin(*batch())["loss"], expected)


def test_the_hinge_of_a_mean_over_processes_is_that_of_the_whole():
    """``reduce_mean`` decides the hinge: a part within the budget pays where the whole exceeds it."""
    target = batch()[1]
    logits, guide = torch.randn(8, CLASSES), torch.zeros(8)
    spent = functional.usage(logits, target, guide).item()
    settings = {"multiplier": 3.0, "budget": 2 * spent}
    slack = functional.disk_terms(logits, logits, target, guide, **settings)
    pays = functional.disk_terms(logits, logits, target, guide, reduce_mean=lambda mean: 4 * mean, **settings)
    assert (pays.loss - slack.loss).item() == pytest.approx(-3.0 * spent, rel=1e-5)
