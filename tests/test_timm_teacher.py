"""timm's teacher in a task: its images, its checkpoint, its accuracy; and a guide module of one's own."""

import argparse
import copy
import logging

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

from timm.layers import convert_splitbn_model  # noqa: E402
from timm.task import DistillationTeacher  # noqa: E402

from disk_plugin import GuideHead  # noqa: E402
from disk_plugin.integrations.timm import DiSKSimKDTask, DiSKTask, SimKDModel  # noqa: E402
from disk_plugin.integrations.timm.teacher_checkpoint import load_teacher  # noqa: E402

CLASSES, SIZE = 5, (3, 32, 32)
SHADES = torch.linspace(0.1, 0.9, CLASSES)
NORMS = [(None, None), ((0.3, 0.35, 0.4), (0.4, 0.4, 0.5)), ((0.0,), (1.0,))]


def pixels(samples=40, channels=3, seed=1):
    """Images in [0, 1] whose class is their brightness, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(samples) % CLASSES
    noise = 0.06 * torch.randn(samples, channels, 32, 32, generator=generator)
    return (SHADES[target].view(-1, 1, 1, 1) + noise).clamp(0, 1), target


def normalised(image, mean, std):
    return (image - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


@pytest.fixture(scope="module", params=[3, 1], ids=["colour", "grey"])
def trained(request):
    """A teacher trained on images normalised with mean .45 and std .35, its accuracy there, and the images."""
    channels = request.param
    torch.manual_seed(0)
    teacher = timm.create_model("test_resnet", num_classes=CLASSES, in_chans=channels)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for step in range(40):
        image, target = pixels(channels=channels, seed=step + 2)
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(normalised(image, (0.45,), (0.35,))), target).backward()
        optimizer.step()
    image, target = pixels(channels=channels)
    with torch.no_grad():
        logits = teacher.eval()(normalised(image, (0.45,), (0.35,)))
    assert (logits.argmax(1) == target).float().mean() >= 0.8
    return teacher, image, target, logits


def given(teacher, how, folder):
    """The teacher as a user can hand it over, who says what it was trained on."""
    channels = teacher.in_chans
    if how == "checkpoint":
        args = argparse.Namespace(model="test_resnet", mean=[0.45], std=[0.35])
        torch.save({"state_dict": teacher.state_dict(), "args": args}, folder / "teacher.pth")
        student = timm.create_model("test_efficientnet", num_classes=CLASSES, in_chans=channels)
        return load_teacher("test_resnet", str(folder / "teacher.pth"), student)
    if how == "wrapper":
        wrapper = DistillationTeacher(copy.deepcopy(teacher))
        wrapper.mean_kd.fill_(0.45), wrapper.std_kd.fill_(0.35)
        return wrapper
    overlay = {"mean": (0.45,) * channels, "std": (0.35,) * channels}
    rebuilt = timm.create_model("test_resnet", num_classes=CLASSES, in_chans=channels, pretrained_cfg_overlay=overlay)
    rebuilt.load_state_dict(teacher.state_dict())
    return rebuilt


@pytest.mark.parametrize("how", ["checkpoint", "configuration", "wrapper"])
@pytest.mark.parametrize(("mean", "std"), NORMS)
def test_the_teacher_reads_what_it_was_trained_on_however_the_run_normalises(trained, how, mean, std, tmp_path):
    teacher, image, target, expected = trained
    channels = teacher.in_chans
    mean = mean if mean is None else (mean * 3)[:channels]
    student = timm.create_model("test_efficientnet", num_classes=CLASSES, in_chans=channels)
    size, std = (channels, 32, 32), std if std is None else (std * 3)[:channels]
    task = DiSKTask(
        student, given(teacher, how, tmp_path), input_size=size, input_mean=mean, input_std=std, verbose=False
    )
    config = student.pretrained_cfg
    own = [sum(config[name]) / 3 if channels == 1 else config[name] for name in ("mean", "std")]
    own = [(value,) if isinstance(value, float) else value for value in own]
    batch = normalised(image, mean or own[0], std or own[1])
    torch.testing.assert_close(task._teacher(batch)[0], expected, rtol=1e-3, atol=1e-3)
    task(batch, target)
    right = 100 * (expected.argmax(1) == target).float().mean().item()
    assert task.report.logged()["teacher_top1"] == pytest.approx(right)


def test_a_wrapper_of_the_users_stays_as_it_is():
    teacher = timm.create_model("test_resnet", num_classes=CLASSES)
    wrapper = DistillationTeacher(teacher, dtype=torch.bfloat16)
    before = wrapper.mean_kd
    task = DiSKTask(
        timm.create_model("test_efficientnet", num_classes=CLASSES), wrapper, input_size=SIZE, verbose=False
    )
    assert wrapper.mean_kd is before
    assert task.teacher.model is teacher


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_teachers_images_are_rounded_once(dtype):
    student, teacher = (
        timm.create_model(name, num_classes=CLASSES).to(torch.bfloat16) for name in ("test_efficientnet", "test_resnet")
    )
    task = DiSKTask(student, teacher, input_size=SIZE, dtype=torch.bfloat16, verbose=False)
    image = torch.randn(4, *SIZE).to(dtype)
    mean, std = (torch.tensor(student.pretrained_cfg[name]).double().view(1, 3, 1, 1) for name in ("mean", "std"))
    exact = (image.double() * std + mean - 0.5) / 0.5
    found = task._normalize(image)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6).all()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"input_mean": (0.5, 0.5)}, ValueError, r"input_mean must have one value, or one for each of 3 channels, got"),
        ({"input_std": (0.5, 0.0, 0.5)}, ValueError, "input_std must be > 0, got 0.0"),
        ({"input_mean": 0.5}, TypeError, "input_mean must be a sequence of numbers, got float 0.5"),
        ({"input_std": ("a",)}, TypeError, "input_std must be a number, got str 'a'"),
        (
            {"input_size": (1, 32, 32)},
            ValueError,
            r"must have the student's 3 channels, got 1: give input_size=\(3, 32, 32\) \(--input-size 3 32 32\)",
        ),
    ],
)
def test_images_that_cannot_be_the_students_are_refused(settings, error, message):
    pair = [timm.create_model(name, num_classes=CLASSES) for name in ("test_efficientnet", "test_resnet")]
    with pytest.raises(error, match=message):
        DiSKTask(*pair, **{"input_size": SIZE, "verbose": False, **settings})


# ---- the checkpoint --------------------------------------------------------------------------------------------------


def saved(folder, trained, **args):
    torch.save({"state_dict": trained.state_dict(), "args": argparse.Namespace(**args)}, folder / "teacher.pth")
    return str(folder / "teacher.pth")


@pytest.mark.parametrize(
    ("name", "built", "args"),
    [
        ("test_vit", {"img_size": 32}, {"model_kwargs": {"img_size": 32}}),
        ("test_vit", {"img_size": 32, "global_pool": "avg"}, {"model_kwargs": {"img_size": 32}, "gp": "avg"}),
        ("test_resnet", {"global_pool": "max"}, {"gp": "max", "model_kwargs": {}}),
        ("test_efficientnet", {"bn_eps": 0.3}, {"bn_eps": 0.3, "gp": None}),
        ("test_resnet", {"in_chans": 1}, {"in_chans": 1, "input_size": None}),
    ],
)
def test_a_teacher_is_built_with_the_arguments_of_its_run(name, built, args, tmp_path):
    torch.manual_seed(0)
    teacher = timm.create_model(name, num_classes=CLASSES, **built).eval()
    channels = built.get("in_chans", 3)
    student = timm.create_model("test_efficientnet", num_classes=CLASSES, in_chans=channels)
    loaded = load_teacher(name, saved(tmp_path, teacher, model=name, **args), student).eval()
    image = torch.randn(2, channels, *((32, 32) if "vit" in name else (64, 64)))
    torch.testing.assert_close(loaded(image), teacher(image), rtol=0, atol=0)


def test_arguments_in_a_plain_dict_serve_too_and_weights_alone_are_built_by_name(tmp_path):
    teacher = timm.create_model("test_vit", num_classes=CLASSES, img_size=32)
    student = timm.create_model("test_efficientnet", num_classes=CLASSES)
    args = {"model_kwargs": {"img_size": 32}, "mean": [0.1, 0.2, 0.3], "std": None}
    torch.save({"state_dict": teacher.state_dict(), "args": args}, tmp_path / "teacher.pth")
    loaded = load_teacher("test_vit", str(tmp_path / "teacher.pth"), student)
    assert (loaded.pretrained_cfg["mean"], loaded.pretrained_cfg["std"]) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    bare = timm.create_model("test_resnet", num_classes=CLASSES)
    torch.save(bare.state_dict(), tmp_path / "bare.pth")
    assert load_teacher("test_resnet", str(tmp_path / "bare.pth"), student).pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


def test_the_tag_of_the_run_decides_what_its_images_were_normalised_with(tmp_path):
    built = {"img_size": 32, "depth": 1}
    teacher = timm.create_model("vit_small_patch16_224", num_classes=CLASSES, **built)
    assert teacher.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    student = timm.create_model("test_efficientnet", num_classes=CLASSES)
    path = saved(tmp_path, teacher, model="vit_small_patch16_224.dino", model_kwargs=built)
    assert load_teacher("vit_small_patch16_224", path, student).pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


def test_a_teacher_trained_with_split_batch_normalisation_loads_what_inference_reads(tmp_path):
    torch.manual_seed(0)
    teacher = convert_splitbn_model(timm.create_model("test_resnet", num_classes=CLASSES), 2)
    teacher(torch.randn(4, *SIZE))
    student = timm.create_model("test_efficientnet", num_classes=CLASSES)
    loaded = load_teacher("test_resnet", saved(tmp_path, teacher, model="test_resnet", split_bn=True), student).eval()
    image = torch.randn(2, *SIZE)
    torch.testing.assert_close(loaded(image), teacher.eval()(image), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "built", "args", "message"),
    [
        (
            "test_vit",
            {"model_name": "test_resnet"},
            {"model": "test_resnet"},
            r"must hold the teacher test_vit \(--kd-model-name\), got the weights of test_resnet",
        ),
        ("test_resnet", {"in_chans": 1}, {}, r"has 1 channel\(s\), the student 3"),
        ("test_resnet", {"num_classes": 7}, {}, "has 7 classes, the student 5"),
        ("test_vit", {"img_size": 32}, {}, "do not fit the teacher test_vit: .*pos_embed"),
    ],
)
def test_a_checkpoint_of_another_teacher_is_refused_with_what_differs(name, built, args, message, tmp_path):
    teacher = timm.create_model(**{"model_name": name, "num_classes": CLASSES, **built})
    student = timm.create_model("test_efficientnet", num_classes=CLASSES)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_teacher(name, saved(tmp_path, teacher, **args), student)


def test_a_student_of_simkd_is_no_teacher(tmp_path):
    pair = [timm.create_model(name, num_classes=CLASSES) for name in ("test_efficientnet", "test_resnet")]
    simkd = SimKDModel(*pair, torch.randn(1, *SIZE))
    path = saved(tmp_path, simkd, model="test_efficientnet")
    with pytest.raises(ValueError, match="must hold a model that predicts by itself, got a student of SimKD"):
        load_teacher("test_efficientnet", path, pair[0])


# ---- a guide of one's own --------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A guide that knows nothing of GuideHead and reads both outputs, or one."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, teacher_logits, teacher_features=None):
        inputs = teacher_logits if teacher_features is None else torch.cat([teacher_logits, teacher_features], 1)
        return self.linear(inputs).squeeze(1)


class LogitsAlone(Plain):
    def forward(self, teacher_logits):
        return super().forward(teacher_logits)


def pair():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=CLASSES, img_size=32), timm.create_model(
        "test_resnet", num_classes=CLASSES
    )


@pytest.mark.parametrize("kind", [DiSKTask, DiSKSimKDTask])
@pytest.mark.parametrize("mode", ["joint", "alternating"])
@pytest.mark.parametrize(
    "guide", [GuideHead(CLASSES, 96), GuideHead(CLASSES), Plain(CLASSES + 96), LogitsAlone(CLASSES)]
)
def test_a_guide_module_is_trained_in_either_mode(guide, mode, kind):
    guide = copy.deepcopy(guide)
    task = kind(*pair(), guide=guide, epochs=2, mode=mode, input_size=SIZE, verbose=False)
    assert task.disk.guide is guide
    before = copy.deepcopy(guide.state_dict())
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    loader = [(torch.randn(8, *SIZE), torch.arange(8) % CLASSES)]
    task.begin_epoch(0)
    task.run_guide_passes(loader)
    task(*loader[0])["loss"].backward()
    optimizer.step()
    task.end_epoch()
    assert any(not torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert guide.training == (mode == "joint")


def test_a_given_head_is_the_keywords_head():
    """Same weights, same loss and gradients as the guide that the task builds itself."""
    built = DiSKTask(*pair(), guide={"hidden_dims": (8,)}, input_size=SIZE, verbose=False)
    passed = DiSKTask(*pair(), guide=copy.deepcopy(built.disk.guide), input_size=SIZE, verbose=False)
    image, target = torch.randn(8, *SIZE), torch.arange(8) % CLASSES
    losses = [task(image, target)["loss"] for task in (built, passed)]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_guide_module_reads_float32_whatever_autocast_gives(dtype):
    task = DiSKTask(*pair(), guide=Plain(CLASSES + 96), epochs=2, mode="alternating", input_size=SIZE, verbose=False)
    loader = [(torch.randn(8, *SIZE), torch.arange(8) % CLASSES)]
    task.begin_epoch(0)
    assert task.run_guide_passes(loader, autocast=lambda: torch.autocast("cpu", dtype)) == 3
    with torch.autocast("cpu", dtype):
        task(*loader[0])["loss"].backward()
    assert task.report.logged()["teacher_top1"] >= 0


@pytest.mark.parametrize(
    ("guide", "error", "message"),
    [
        (
            GuideHead(CLASSES, 7),
            ValueError,
            r"must read the teacher's logits \(1, 5\), pre-logits \(1, 96\), but GuideHead cannot: .*got \(1, 96\)",
        ),
        (GuideHead(4), ValueError, r"logits \(1, 5\), but GuideHead cannot: .*\(N, 4, ...\), got \(1, 5\)"),
        (Plain(9), ValueError, r"Plain cannot: .*shapes cannot be multiplied"),
        (nn.Linear(CLASSES, 1), ValueError, r"one logit per sample, of shape \(1,\) for one image, got \(1, 1\)"),
        (3, TypeError, "guide must be keywords of GuideHead or a Module, got int 3"),
        (GuideHead, TypeError, "guide must be keywords of GuideHead or a Module, got type"),
    ],
)
def test_a_guide_that_does_not_fit_the_teacher_is_refused_at_once(guide, error, message):
    with pytest.raises(error, match=message):
        DiSKTask(*pair(), guide=guide, input_size=SIZE, verbose=False)


# ---- a bad teacher is seen -------------------------------------------------------------------------------------------


def epoch_with(task, image, target, epoch=0):
    task.begin_epoch(epoch)
    task(image, target)
    return task.end_epoch()


def test_a_teacher_with_reversed_classes_is_warned_of_once_and_again_after_a_resume(trained, tmp_path, caplog):
    teacher, image, target, _ = trained
    channels = teacher.in_chans
    image, target = image[target != 2], target[target != 2]  # reversed, the class in the middle stays right
    student = timm.create_model("test_efficientnet", num_classes=CLASSES, in_chans=channels)
    settings = {"input_mean": (0.45,), "input_std": (0.35,), "input_size": (channels, 32, 32), "verbose": False}

    def fresh():
        return DiSKTask(student, given(teacher, "configuration", tmp_path), epochs=3, **settings)

    image = normalised(image, (0.45,), (0.35,))
    with caplog.at_level(logging.WARNING):
        good = fresh()
        assert epoch_with(good, image, target)["teacher_top1"] >= 80
        assert "teacher is right" not in caplog.text
        task = fresh()
        means = epoch_with(task, image, CLASSES - 1 - target)
        assert means["teacher_top1"] <= 20
        assert means["student_top1"] >= 0
        assert caplog.text.count("DiSK: the teacher is right on") == 1
        epoch_with(task, image, CLASSES - 1 - target, 1)
        assert caplog.text.count("DiSK: the teacher is right on") == 1
        epoch_with(fresh(), image, CLASSES - 1 - target, 2)  # of a resumed run
        assert caplog.text.count("DiSK: the teacher is right on") == 2


@pytest.mark.parametrize("kind", [DiSKTask, DiSKSimKDTask])
def test_the_epoch_reports_both_accuracies_in_percent_and_the_task_loss(kind):
    task = kind(*pair(), criterion=nn.CrossEntropyLoss(label_smoothing=0.2), epochs=2, input_size=SIZE, verbose=False)
    task.begin_epoch(0)
    student, teacher, losses = 0, 0, []
    for samples in (8, 4):  # unequal batches
        image, target = torch.randn(samples, *SIZE), torch.arange(samples) % CLASSES
        result = task(image, target)
        losses.append(samples * result["task_loss"].item())
        student += (result["output"].argmax(1) == target).sum().item()
        teacher += (task._teacher(image)[0].argmax(1) == target).sum().item()
    means = task.end_epoch()
    assert means["student_top1"] == pytest.approx(100 * student / 12)
    assert means["teacher_top1"] == pytest.approx(100 * teacher / 12)
    assert means["task_loss"] == pytest.approx(sum(losses) / 12, rel=1e-5)
    assert not {"student_accuracy", "teacher_accuracy"} & set(means)
