"""ScaleKD as a method: what it reads, weighed by the guide, in timm's and mdistiller's models, what is refused."""

import copy
import re
from pathlib import Path

import pytest
import torch
from tail_teachers import CLASSES, MDistillerResNet, images, timm_teacher
from torch import nn

from disk_plugin import DiSKLoss, GuideHead
from disk_plugin.distiller import Distiller
from disk_plugin.features import METHODS, Guided, Outputs, Pair, ScaleKD, pair_of
from disk_plugin.features.launching import explained, settings_of
from disk_plugin.features.scalekd import ScaleKDLoss, logit_losses, presets
from disk_plugin.taps import TeacherTail, get_tail, with_maps

N = 4
PATHS = {"before_last": "layer2", "last": "layer3"}
NAMES = ["ce", "kd", "proxy", "main", "proxy_no_dc", "main_no_dc"]


def models():
    torch.manual_seed(3)
    return MDistillerResNet((4, 6, 8), depth=1), MDistillerResNet().eval()


def setting(**settings):
    """A method for two of mdistiller's ResNets, their outputs for a batch, and its labels."""
    student, teacher = models()
    taps = with_maps(student, PATHS), with_maps(teacher, PATHS)
    method = ScaleKD.for_pair(pair_of(*taps, torch.randn(2, 3, 16, 16)), **{"norm": "layer", **settings})
    x = torch.randn(N, 3, 16, 16)
    student.eval()
    with torch.no_grad():
        logits, maps = taps[1](x)
    found = taps[0](x)
    shown = Outputs(found[0].detach(), maps={name: each.detach() for name, each in found[1].items()})
    return method, student, teacher, shown, Outputs(logits, maps=maps), torch.arange(N) % CLASSES


def learning(outputs):
    """The same outputs as leaves."""
    maps = {name: each.clone().requires_grad_() for name, each in outputs.maps.items()}
    return Outputs(outputs.logits.clone().requires_grad_(), maps=maps)


def test_the_losses_are_those_of_logits_and_of_features():
    settings = {"ce_weight": 0.3, "kd_weight": 0.8, "temperature": 2.0}
    features = {"original_weight": 2.0, "dc_removed_weight": 1.5, "proxy_weight": 0.5, "proxy_heads": 4}
    method, _, _, student, teacher, target = setting(**settings, **features)
    found = method(student, teacher, target)
    expected = logit_losses(student.logits, teacher.logits, target, **settings)
    loss = ScaleKDLoss((6, 8, 8), (8, 4, 4), method.features.tail, norm="layer", **features)
    loss.load_state_dict(method.features.state_dict())
    expected |= loss(student.maps["before_last"], student.maps["last"], teacher.maps["last"])
    assert list(found) == list(expected) == NAMES
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    assert torch.equal(method.predict(student), student.logits)


def test_an_ignored_sample_has_no_loss_and_no_gradient_even_where_the_teacher_is_nan():
    method, _, _, student, teacher, target = setting()
    target[1] = -100
    student = learning(student)
    poisoned = Outputs(teacher.logits.clone(), maps={"last": teacher.maps["last"].clone()})
    poisoned.logits[1], poisoned.maps["last"][1] = torch.nan, torch.inf
    found, expected = (method(student, each, target) for each in (poisoned, teacher))
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    assert not any(loss[1] for loss in found.values())
    inputs = [student.logits, *student.maps.values(), *method.trainable_parameters()]
    gradients = torch.autograd.grad(sum(loss.sum() for loss in found.values()), inputs, allow_unused=True)
    assert all(each.isfinite().all() for each in gradients)
    assert not any(each[1].any() for each in gradients[:3])
    target[1] = 0
    assert method(student, poisoned, target)["proxy"].isnan().tolist() == [False, True, False, False]


def test_probabilities_are_targets_too():
    method, _, _, student, teacher, target = setting()
    soft = nn.functional.one_hot(target, CLASSES).float()
    found, expected = method(student, teacher, soft), method(student, teacher, target)
    assert all(torch.allclose(found[name], expected[name]) for name in NAMES)


# ---- with the guide --------------------------------------------------------------------------------------------------


def guided(method, logit, **settings):
    """The method weighed by a guide that says one g of all samples, or one of each."""

    class Constant(nn.Module):
        def forward(self, teacher_logits):
            return torch.as_tensor(logit).expand(len(teacher_logits))

    return Guided(DiSKLoss(Constant(), discount=None, budget=1.0, multiplier=1.0), method, **settings)


def test_a_guide_of_0_is_the_method_itself_bit_for_bit():
    method, _, _, student, teacher, target = setting()
    loss = guided(method, -200.0, logit_loss=False)
    one, other = learning(student), learning(student)
    terms = loss.terms(one, teacher, target, reduction="none")
    assert not terms.disk.guide.any()
    expected = torch.zeros(N)
    for each in method(other, teacher, target).values():
        expected = expected + each
    assert torch.equal(terms.student_loss, expected)
    gradients = [
        torch.autograd.grad(total.mean(), [side.logits, *side.maps.values(), *method.trainable_parameters()])
        for total, side in ((terms.student_loss, one), (expected, other))
    ]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_disks_own_loss_of_logits_takes_the_place_of_the_methods():
    method, _, _, student, teacher, target = setting()
    loss = guided(method, -200.0)
    assert loss.logit_loss
    terms = loss.terms(student, teacher, target, reduction="none")
    losses = method(student, teacher, target)
    features = sum(losses[name] for name in NAMES[2:])
    torch.testing.assert_close(terms.feature, features)
    torch.testing.assert_close(terms.student_loss, features + terms.disk.student_loss)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_sample_with_a_guide_of_1_gets_no_gradient_from_the_features(norm):
    method, _, _, student, teacher, target = setting(norm=norm)
    if norm == "batch":
        method.eval()  # or it takes part in the others' statistics
    student = learning(student)
    logits = torch.tensor([-200.0, 200.0, -1.0, 1.0])
    terms = guided(method, logits).terms(student, teacher, target, reduction="none")
    gradients = torch.autograd.grad(terms.student_loss.sum(), list(student.maps.values()))
    for each in gradients:
        assert not each[1].any()
        assert each[[0, 2, 3]].flatten(1).any(1).all()
    losses = method(student, teacher, target)
    expected = (1 - terms.disk.guide) * sum(losses[name] for name in NAMES[2:])
    torch.testing.assert_close(terms.feature, expected.detach())


def test_the_guide_may_weigh_the_maps_without_their_mean_alone():
    method, _, _, student, teacher, target = setting(weighted_views="dc_removed")
    terms = guided(method, 0.4).terms(student, teacher, target, reduction="none")
    losses, w = method(student, teacher, target), 1 - terms.disk.guide
    expected = losses["proxy"] + losses["main"] + w * (losses["proxy_no_dc"] + losses["main_no_dc"])
    torch.testing.assert_close(terms.feature, expected)
    assert setting()[0].unguided == ScaleKD.unguided == {"ce", "kd"}


# ---- what is trained and what is left --------------------------------------------------------------------------------


def test_nothing_is_left_of_it_in_the_student_and_nothing_reaches_the_teacher():
    student, teacher = models()
    names, x = set(student.state_dict()), torch.randn(N, 3, 16, 16)
    taps = with_maps(student, PATHS), with_maps(teacher, PATHS)
    method = ScaleKD.for_pair(pair_of(*taps, x))
    kept = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD([*student.parameters(), *method.trainable_parameters()], lr=0.1)
    for _ in range(2):
        with torch.no_grad():
            logits, maps = taps[1](x)
        found = taps[0](x)
        losses = method(Outputs(found[0], maps=found[1]), Outputs(logits, maps=maps), torch.arange(N) % CLASSES)
        optimizer.zero_grad()
        sum(loss.mean() for loss in losses.values()).backward()
        optimizer.step()
    assert set(student.state_dict()) == names
    assert not any("tail" in key for key in method.state_dict())
    assert all(torch.equal(value, kept[key]) for key, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    student.eval()
    before = student(x)[0]
    with torch.no_grad():
        for parameter in method.trainable_parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(student(x)[0], before)
    bare = MDistillerResNet((4, 6, 8), depth=1)
    bare.load_state_dict(student.state_dict())
    assert torch.equal(bare.eval()(x)[0], before)


def test_its_settings_are_flags_with_a_sentence_each():
    found = settings_of(ScaleKD)
    assert found["kd_weight"] == 0.5
    assert found["norm"] == "batch"
    assert len(found) == 14
    assert all(explained(ScaleKD, name) != name.replace("_", " ") for name in found)
    assert METHODS["scalekd"] is ScaleKD
    assert set(ScaleKD.shape_settings) <= set(found)
    assert ScaleKD.reads_of("student") == {"last", "before_last"}
    assert ScaleKD.reads_of("teacher") == {"last"}


@pytest.mark.parametrize("family", ["swin, any size", "vit", "convnext"])
def test_timms_models_teach_and_learn_at_any_size(family):
    timm = pytest.importorskip("timm")
    teacher, x = timm_teacher(family), images(family, N)
    student = with_maps(timm.create_model("test_vit", num_classes=CLASSES, img_size=tuple(x.shape[2:])))
    shown = with_maps(teacher)
    method = ScaleKD.for_pair(pair_of(student, shown, x))
    with torch.no_grad():
        logits, maps = shown(x)
    found = student(x)
    losses = method(Outputs(found[0], maps=found[1]), Outputs(logits, maps=maps), torch.arange(N) % CLASSES)
    assert list(losses) == NAMES
    sum(loss.mean() for loss in losses.values()).backward()
    assert student.model.patch_embed.proj.weight.grad.any()


def test_the_settings_of_a_tail_reach_it():
    teacher, x = timm_teacher("vit"), images("vit", 2)
    pair = pair_of(with_maps(timm_model("test_vit", img_size=(32, 48))), with_maps(teacher), x)
    tail = ScaleKD.for_pair(pair, tail_blocks=1, tail_final_blocks=1, checkpoint_tail=True).features.tail
    assert tail.checkpoint
    assert [len(part.blocks) for part in (tail.body, tail.final_blocks)] == [1, 1]


# ---- what is refused -------------------------------------------------------------------------------------------------


def built(**settings):
    return setting(**settings)[0]


def without(side, name):
    method, _, _, *shown, target = setting()
    index = ["student", "teacher"].index(side)
    maps = {key: value for key, value in shown[index].maps.items() if key != name}
    shown[index] = Outputs(shown[index].logits, maps=maps)
    return method(*shown, target)


def pair_with(teacher, size=(16, 16)):
    student, _ = models()
    paths = None if hasattr(teacher, "forward_intermediates") else PATHS
    return pair_of(with_maps(student, PATHS), with_maps(teacher.eval(), paths), torch.randn(2, 3, *size))


def timm_model(name, **settings):
    return pytest.importorskip("timm").create_model(name, num_classes=CLASSES, **settings)


def under_no_grad():
    method, _, _, student, teacher, target = setting()
    with torch.no_grad():
        method(learning(student), teacher, target)  # nothing to protect: no gradient was asked for
    entry = torch.randn(N, 16, 8, 8, requires_grad=True)
    with torch.no_grad():
        method.features.tail(entry)


def of_sizes(before, last, **settings):
    tail = TeacherTail(nn.Conv2d(16, 24, 2, stride=2).eval(), (16, 8, 8), (24, 4, 4))
    return ScaleKD((6, *before), (8, *last), tail, **settings)


def one_location():
    method, *_, student, teacher, target = setting()
    maps = {**student.maps, "last": student.maps["last"].mean((2, 3), keepdim=True)}
    method(Outputs(student.logits, maps=maps), teacher, target)


def swapped():
    student, teacher = models()
    paths = {"before_last": PATHS["last"], "last": PATHS["before_last"]}
    pair = pair_of(with_maps(student, paths), with_maps(teacher, PATHS), torch.randn(2, 3, 16, 16))
    ScaleKD.for_pair(pair)


def in_training_mode():
    method, _, model, student, teacher, target = setting()
    model.train()
    method(student, teacher, target)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: built(proxy_heads=5), ValueError, r"proxy_heads must divide the teacher's width 16, one of \[1, 2, 4"),
        (lambda: built(main_heads=7), ValueError, r"main_heads must divide the teacher's width 24, one of .*, got 7"),
        (lambda: built(weighted_views="all"), ValueError, "weighted_views must be one of"),
        (lambda: built(kd_weight=-1.0), ValueError, r"kd_weight must be >= 0, got -1\.0"),
        (lambda: built(temperature=0.0), ValueError, r"temperature must be > 0, got 0\.0"),
        (
            lambda: without("student", "before_last"),
            ValueError,
            r"needs the map 'before_last' of the student .*\['last",
        ),
        (lambda: without("teacher", "last"), ValueError, "ScaleKD needs the map 'last' of the teacher in Outputs.maps"),
        (under_no_grad, RuntimeError, r"a tail was called under torch\.no_grad\(\)"),
        (in_training_mode, RuntimeError, "the teacher of this tail is in training mode"),
        (
            lambda: ScaleKD.for_pair(pair_with(timm_model("test_efficientnet"), (32, 32))),
            ValueError,
            "no tail found in EfficientNet: .* A tail works for timm's Swin, SwinV2, ConvNeXt, ResNet, ViT",
        ),
        (
            lambda: ScaleKD.for_pair(pair_with(timm_model("test_resnet"), (32, 32))),
            ValueError,
            "the teacher's final map has size 1 x 1, so that nothing is left without its mean: set dc_removed_weight=0",
        ),
        (
            lambda: of_sizes((8, 8), (1, 1)),
            ValueError,
            "the student's last map has size 1 x 1, so that nothing is left without its mean: set dc_removed_weight=0",
        ),
        (lambda: of_sizes((1, 1), (1, 1)), ValueError, "the student's map before its last stage has size 1 x 1"),
        (one_location, ValueError, "stage4 has size 1 x 1, so that nothing is left without its mean"),
        (lambda: built(attention_scale=0.0), ValueError, r"attention_scale must be > 0, got 0\.0"),
        (swapped, ValueError, r"must not be smaller than its last one, got \(4, 4\) and \(8, 8\): .* swapped"),
        (
            lambda: pair_with(timm_teacher("vit")),
            ValueError,
            r"see the same images, of size \(3, 16, 16\), but the teacher: Input height \(16\) doesn't match",
        ),
        (lambda: pair_of(*models(), torch.ones(1)), TypeError, r"student must be a MapTap, the result of taps\.with_m"),
        (
            lambda: ScaleKD.for_pair(Pair(*[Outputs(torch.ones(2, 5))] * 2, lambda: None)),
            ValueError,
            "ScaleKD needs the map 'before_last' of the student",
        ),
        (
            lambda: ScaleKD.for_pair(Pair(*setting()[3:5], lambda: None)),
            ValueError,
            "this host does not show the teacher's last stage: give the method a TeacherTail of your own",
        ),
        (
            lambda: Distiller(*models(), Guided(DiSKLoss(GuideHead(CLASSES)), built())),
            ValueError,
            r"ScaleKD reads \['before_last', 'last'\], of which only features can be found in any classifier",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_tail_that_is_not_behind_the_teachers_last_map_is_refused():
    _, teacher = models()
    shown = [Outputs(logits, maps=maps) for logits, maps in (tap(torch.randn(2, 3, 16, 16)) for tap in taps_of())]
    tail = get_tail(teacher, torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"must be what its last stage makes, \(C, H, W\) = \(24, 8, 8\), got \(24, 4"):
        ScaleKD.for_pair(Pair(*shown, lambda: None, lambda: tail))
    own = TeacherTail(nn.Conv2d(16, 24, 2, stride=2).eval(), (16, 8, 8), (24, 4, 4))
    assert ScaleKD.for_pair(Pair(*shown, lambda: None, lambda: own)).features.tail is own


def taps_of():
    return [with_maps(model, PATHS) for model in models()]


# ---- published settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets.PAIRS)
def test_published_settings_fit_their_pairs(name):
    preset = presets.PAIRS[name]
    eva = name.startswith("eva")
    entry, final = ((1024, 16, 16), (1024, 16, 16)) if eva else ((768, 14, 14), (1536, 7, 7))
    with torch.device("meta"):
        tail = TeacherTail(nn.Identity().eval(), entry, final)
        method = ScaleKD((1024, 14, 14), (2048, 7, 7), tail, **preset["method"])
    assert method.features.weights["original"] == pytest.approx(4, abs=0.1)
    assert preset["top1"]["scalekd"] - preset["top1"]["baseline"] > 2
    if name == "swin_large -> resnet50":
        assert sum(parameter.numel() for parameter in method.trainable_parameters()) == 175_958_016
    timm = pytest.importorskip("timm")
    models, size = preset["models"], preset["models"]["image_size"]
    with torch.device("meta"):
        for side in ("student", "teacher"):
            model = timm.create_model(models[side], **models[f"{side}_settings"]).eval()
            assert model(torch.empty(1, 3, size, size)).shape == (1, model.num_classes)
        shown = model.forward_intermediates(torch.empty(1, 3, size, size), output_fmt="NCHW")[1][-1]
    assert tuple(shown.shape[1:]) == final  # the teacher's, as above
    assert preset["recipe"]["epochs"] == 300


def test_every_published_setting_says_whose_it_is():
    lines = Path(presets.__file__).read_text().splitlines()
    values = [line for line in lines if re.match(r' +("\w+": [^{]+,|"\w+",|\(\d)', line)]
    assert len(values) > 70
    assert all(re.search(r"# (paper|authors' code|ours)", line) for line in values), values
    ScaleKD((12, 8, 8), (24, 4, 4), get_tail(models()[1], torch.randn(2, 3, 16, 16)), **presets.CIFAR100["method"])


def test_a_student_of_one_location_is_compared_with_the_means_alone():
    method = of_sizes((8, 8), (1, 1), dc_removed_weight=0.0, norm="layer")
    maps = {"before_last": torch.randn(2, 6, 8, 8), "last": torch.randn(2, 8, 1, 1, requires_grad=True)}
    teacher = Outputs(torch.randn(2, 5), maps={"last": torch.randn(2, 24, 4, 4)})
    losses = method(Outputs(torch.randn(2, 5), maps=maps), teacher, torch.arange(2))
    assert list(losses) == ["ce", "kd", "proxy", "main"]
    losses["main"].sum().backward()
    assert 0 < maps["last"].grad.norm() < 1e3
