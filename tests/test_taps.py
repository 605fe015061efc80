import copy
import inspect
import io
import math
import re
import threading
import types
import weakref

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel

from disk_plugin import GuideHead
from disk_plugin.schedule import estimate_budget
from disk_plugin.taps import logits_of, with_features

CLASSES, WIDTH = 5, 8
needs_get_submodule = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5), reason="dynamo of torch 2.4 traces no get_submodule"
)


class Classifier(nn.Module):
    """A body and a head; ``wrap`` says what becomes of the logits and the features."""

    def __init__(self, wrap=lambda logits, features: logits):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, CLASSES)
        self.wrap = wrap

    def forward(self, x):
        features = self.body(x)
        return self.wrap(self.head(features), features)


class WithAuxiliary(Classifier):
    """A Linear registered after the head, ``width`` wide; None: registered but never called."""

    def __init__(self, width):
        super().__init__()
        self.auxiliary = nn.Linear(WIDTH, width or CLASSES)
        self.called = width is not None

    def forward(self, x):
        features = self.body(x)
        if self.called:
            self.auxiliary(features)
        return self.head(features)


def sequential():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)
    )


def images(count=4):
    return torch.randn(count, 3, 2, 2)


def documented_arguments(documented):
    block = re.search(r"\n\s*Args:\n(.*?)\n\s*\n", inspect.cleandoc(documented.__doc__) + "\n\n", re.DOTALL).group(1)
    return re.findall(r"^ {4}(\w+):", block, re.MULTILINE)


def tensors_kept_on(layer):
    return [name for name, value in vars(layer).items() if isinstance(value, torch.Tensor)]


def check_tap(model, x, head_name):
    """The whole promise: same logits, the head's input, its width; the head makes the logits of the features."""
    with torch.no_grad():
        expected = model(x)
        tap = with_features(model)
        logits, features = tap(x)
        assert tap.layer == head_name
        assert torch.equal(logits, expected)
        assert features.shape == (len(x), tap.feature_dim)
        assert tap.feature_dim == model.get_submodule(head_name).in_features
        assert torch.equal(model.get_submodule(head_name)(features), logits)
        assert logits.std() > 0  # an all-zero head would reproduce anything
        assert features.std() > 0


# ---- any classifier --------------------------------------------------------------------------------------------------


def test_sequential_gives_its_logits_and_the_input_of_its_last_linear():
    model = sequential().eval()
    check_tap(model, images(), "4")
    x = images()
    with torch.no_grad():
        assert torch.equal(with_features(model)(x)[1], model[:4](x))


def test_a_bare_linear_reads_the_input_itself():
    x = torch.randn(2, 3)
    tap = with_features(nn.Linear(3, 4))
    assert tap.feature_dim == 3
    assert torch.equal(tap(x)[1], x)


@pytest.mark.parametrize(
    ("name", "head"), [("resnet18", "fc"), ("mobilenet_v3_small", "classifier.3"), ("vit", "heads.head")]
)
def test_torchvision_model_gives_features_that_its_head_turns_into_the_logits(name, head):
    if name == "vit":
        sizes = {"image_size": 32, "patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
        model = torchvision.models.VisionTransformer(**sizes, num_classes=CLASSES)
        nn.init.normal_(model.heads.head.weight)  # zeros from the factory
    else:
        model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
    check_tap(model.eval(), torch.randn(2, 3, 32, 32), head)


@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_timm_model_gives_features_that_its_head_turns_into_the_logits(name):
    model = timm.create_model(name, pretrained=False, num_classes=CLASSES).eval()
    head = model.get_classifier()
    if not isinstance(head, nn.Linear):
        pytest.skip(f"{name} has a {type(head).__name__} head")
    head_name = next(name for name, module in model.named_modules() if module is head)
    check_tap(model, torch.randn(1, *model.default_cfg["input_size"]), head_name)


def test_timm_is_tested_with_at_least_one_model_of_each_family():
    assert {"test_resnet", "test_vit", "test_efficientnet", "test_convnext"} <= set(timm.list_models("test_*"))


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda logits, features: (logits, features), id="tuple"),
        pytest.param(lambda logits, features: [logits, features], id="list"),
        pytest.param(lambda logits, features: {"features": features, "logits": logits}, id="dict-logits"),
        pytest.param(lambda logits, features: {"aux": features, "out": logits}, id="dict-out"),
        pytest.param(lambda logits, features: {"out": features, "logits": logits}, id="logits-before-out"),
        pytest.param(lambda logits, features: types.SimpleNamespace(logits=logits), id="object"),
    ],
)
def test_logits_are_found_in_every_promised_kind_of_output(wrap):
    model, x = Classifier(wrap), images()
    logits, features = with_features(model)(x)
    assert torch.equal(features, model.body(x))
    assert torch.equal(logits, model.head(features))


@pytest.mark.parametrize(
    ("output", "named"),
    [
        ("text", "got str"),
        (None, "got NoneType"),
        ((), "got tuple"),
        (("text",), "got tuple"),
        ({"scores": torch.zeros(4, CLASSES)}, re.escape("got dict with keys ['scores']")),
        (types.SimpleNamespace(scores=torch.zeros(4, CLASSES)), "got SimpleNamespace"),
    ],
)
def test_output_of_an_unknown_kind_is_named(output, named):
    with pytest.raises(TypeError, match=named):
        with_features(Classifier(lambda logits, features: output))(images())
    with pytest.raises(TypeError, match=named):
        logits_of(output)


def test_further_arguments_reach_the_model():
    class Scaled(nn.Linear):
        def forward(self, x, shift, *, scale):
            return super().forward(x * scale + shift)

    model, x = Scaled(3, 4), torch.randn(2, 3)
    logits, _ = with_features(model)(x, 1.0, scale=2.0)
    assert torch.equal(logits, model(x, 1.0, scale=2.0))


def test_dense_model_gives_dense_features_by_layer_name():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, CLASSES, 1))
    x = torch.randn(2, 3, 5, 7)
    tap = with_features(model, layer="2")
    logits, features = tap(x)
    assert tap.feature_dim == 6
    assert torch.equal(features, model[:2](x))
    assert torch.equal(logits, model(x))
    assert GuideHead(CLASSES, tap.feature_dim)(logits, features).shape == (2, 5, 7)


# ---- which layer -----------------------------------------------------------------------------------------------------


def test_layer_is_chosen_by_name():
    model, x = Classifier(), images()
    tap = with_features(model, layer="body.1")
    logits, features = tap(x)
    assert (tap.layer, tap.feature_dim) == ("body.1", 12)
    assert torch.equal(features, x.flatten(1))
    assert torch.equal(logits, model(x))


def test_model_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match="model must be a Module, got function"):
        with_features(lambda x: x)


def test_model_without_linear_is_refused():
    with pytest.raises(ValueError, match=r"no nn\.Linear layer.*pass layer=NAME"):
        with_features(nn.Sequential(nn.Conv2d(3, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def test_model_without_linear_is_told_its_last_layers_with_their_kinds():
    model = nn.Sequential(
        *[nn.Conv2d(3, 3, 1) for _ in range(6)], nn.ReLU(), nn.Conv2d(3, CLASSES, (1, 2)), nn.Flatten()
    )
    expected = f"candidates: '7' (Conv2d(3, {CLASSES}, 1x2)), '5' (Conv2d(3, 3, 1x1)), '4' (Conv2d(3, 3, 1x1)), "
    with pytest.raises(ValueError, match=re.escape(expected) + r"'3' .*, '2' \(Conv2d\(3, 3, 1x1\)\), \.\.\.$"):
        with_features(model)
    assert with_features(model, layer="7").feature_dim == 3
    with pytest.raises(ValueError, match="candidates: none, as no module has in_features or in_channels"):
        with_features(nn.ReLU())


def test_unknown_layer_name_is_refused_with_the_candidates():
    with pytest.raises(ValueError, match=r"got 'heda'; candidates: 'head' \(Linear.*'body\.1' \(Linear"):
        with_features(Classifier(), layer="heda")


def test_layer_without_an_input_width_is_refused():
    with pytest.raises(TypeError, match=r"layer 'body\.2' must have in_features or in_channels, got Tanh"):
        with_features(Classifier(), layer="body.2")


@pytest.mark.parametrize("width", [3, CLASSES], ids=["other-shape", "shape-of-the-logits"])
def test_last_linear_that_does_not_make_the_logits_is_refused_on_the_first_batch(width):
    tap = with_features(WithAuxiliary(width))
    expected = f"pass layer=NAME; candidates: 'head' (Linear({WIDTH}, {CLASSES})), 'body.1' (Linear(12, {WIDTH}))"
    with pytest.raises(RuntimeError, match=re.escape(expected)):
        tap(images())
    with pytest.raises(RuntimeError, match="pass layer=NAME"):  # a caught error must not count as a check passed
        tap(images())


def test_naming_the_head_helps_where_the_last_linear_is_not_it():
    model, x = WithAuxiliary(CLASSES), images()
    logits, features = with_features(model, layer="head")(x)
    assert torch.equal(features, model.body(x))
    assert torch.equal(logits, model.head(features))


@pytest.mark.parametrize("layer", [None, "auxiliary"])
def test_layer_that_is_never_called_is_refused(layer):
    tap = with_features(WithAuxiliary(None), layer=layer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"layer 'auxiliary' was not called.*candidates: 'head' \(Linear"):
            tap(images())


def test_layer_no_longer_called_is_noticed_on_any_batch():
    model = WithAuxiliary(CLASSES)
    tap = with_features(model, layer="auxiliary")
    tap(images())
    model.called = False
    with pytest.raises(RuntimeError, match="layer 'auxiliary' was not called"):  # not the features of the last batch
        tap(images())


def test_layer_that_folds_positions_into_the_batch_is_refused():
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, CLASSES), nn.Unflatten(0, (2, 4)), nn.Flatten())
    with pytest.raises(RuntimeError, match=r"reads a tensor of shape \(8, 3\), expected \(2, 3, \.\.\.\)"):
        with_features(model, layer="1")(torch.randn(2, 4, 3))


def test_layer_is_compared_with_the_logits_on_the_first_batch_only():
    model, x = Classifier(), images()
    tap = with_features(model)
    tap(x)
    model.wrap = lambda logits, features: logits + 1
    assert torch.equal(tap(x)[0], model.head(model.body(x)) + 1)
    with pytest.raises(RuntimeError, match="does not make the model's logits"):
        with_features(model)(x)


def test_logits_rounded_to_half_precision_still_belong_to_their_layer():
    logits, _ = with_features(Classifier(lambda logits, features: logits.bfloat16()))(images())
    assert logits.dtype == torch.bfloat16


# ---- the model stays the caller's ------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A task that holds its teacher as a submodule."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher


def test_a_teacher_that_its_parents_train_reaches_is_warned_of_once():
    holder = Holder(with_features(sequential().eval()))
    x = images()
    with torch.no_grad():
        holder.teacher(x)
        holder.train()
        with pytest.warns(UserWarning, match="evaluation mode when it was wrapped and is in training mode now"):
            holder.teacher(x)
        holder.teacher(x)


def test_a_student_in_training_mode_is_not_warned_of():
    student = with_features(sequential().train())
    student(images())
    with torch.no_grad():
        student(images())
    late = with_features(sequential().eval())
    late.train()
    late(images())  # with gradients: it trains


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_carried_over_and_reaches_the_model(training):
    model = sequential().train(training)
    tap = with_features(model)
    assert all(module.training == training for module in tap.modules())
    tap.train(not training)
    assert all(module.training != training for module in model.modules())


def test_wrapping_leaves_a_frozen_norm_in_eval_mode():
    model = sequential().train()
    model[2].eval()
    with_features(model)
    assert model.training
    assert not model[2].training


@pytest.mark.parametrize("container", [nn.DataParallel, AveragedModel])
def test_wrapping_leaves_an_eval_model_inside_a_container_in_eval_mode(container):
    contained = container(sequential().eval())
    with_features(contained)
    assert not contained.module.training


def test_state_dict_of_the_wrapped_model_keeps_its_keys():
    model = sequential()
    before = list(model.state_dict())
    tap = with_features(model)
    tap(images())
    assert list(model.state_dict()) == before
    assert list(tap.state_dict()) == [f"model.{key}" for key in before]
    sequential().load_state_dict(model.state_dict())


def test_gradients_flow_through_logits_and_features():
    tap = with_features(Classifier())
    logits, features = tap(images())
    gradient = torch.autograd.grad(features.sum(), tap.model.body[1].weight, retain_graph=True)[0]
    assert gradient.abs().sum() > 0
    logits.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in tap.parameters())


def test_no_graph_is_built_under_no_grad():
    with torch.no_grad():
        logits, features = with_features(Classifier())(images())
    assert not logits.requires_grad
    assert not features.requires_grad


def test_no_tensor_stays_referenced_after_forward():
    tap = with_features(Classifier())
    for _ in range(2):  # with and without the check
        logits, features = tap(images())
        assert tensors_kept_on(tap.model.head) == []
        alive = weakref.ref(logits), weakref.ref(features)
        del logits, features
        assert [reference() for reference in alive] == [None, None]


def test_one_model_can_be_tapped_twice():
    model, x = Classifier(), images()
    first, second = with_features(model), with_features(model)
    for tap in (first, second, first):
        logits, features = tap(x)
        assert torch.equal(features, model.body(x))
        assert torch.equal(logits, model.head(features))


# ---- copies, containers, compilers -----------------------------------------------------------------------------------


def test_deepcopy_of_a_tap_is_independent():
    tap, x = with_features(sequential().eval()), images()
    before = tap(x)
    copied = copy.deepcopy(tap)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    after, moved = tap(x), copied(x)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.equal(moved[1], copied.model[:4](x))
    assert not torch.equal(moved[1], after[1])


def test_saved_tap_loads_and_gives_the_same():
    tap, x = with_features(sequential().eval()), images()
    before = tap(x)
    file = io.BytesIO()
    torch.save(tap, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert (loaded.layer, loaded.feature_dim) == (tap.layer, tap.feature_dim)
    assert all(torch.equal(one, other) for one, other in zip(before, loaded(x), strict=True))


def test_copies_used_by_two_threads_at_once_return_their_own_features():
    original = with_features(sequential().eval())
    taps, xs = [copy.deepcopy(original) for _ in range(2)], [images(), images()]
    barrier, seen = threading.Barrier(2, timeout=30), [None, None]

    def meet(*_):
        barrier.wait()  # both are past the layer before either reads what was kept

    def work(index):
        seen[index] = taps[index](xs[index])

    for tap in taps:
        tap.model[4].register_forward_hook(meet)
    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, (logits, features) in zip(xs, seen, strict=True):
        assert torch.equal(features, original.model[:4](x))
        assert torch.equal(logits, original.model(x))


def test_averaged_model_gives_features_of_the_averaged_weights():
    model, x = sequential(), images()
    averaged = AveragedModel(model).eval()
    tap = with_features(averaged)
    averaged.update_parameters(sequential())
    averaged.update_parameters(sequential())
    logits, features = tap(x)
    assert tap.layer == "module.4"
    assert torch.equal(features, averaged.module[:4](x))
    assert torch.equal(logits, averaged.module[4](features))


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()  # the limit on recompilations counts those of other tests


# the compiler hides this warning of its own from users, but cannot where warnings are errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    "checked", [False, pytest.param(True, marks=needs_get_submodule)], ids=["first-batch", "later-batch"]
)
def test_compiled_tap_gives_the_same(checked):
    tap, x = with_features(sequential().eval()), images()
    if checked:
        tap(x)
    compiled = torch.compile(tap, backend="eager", fullgraph=checked)  # the check itself breaks the graph once
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(compiled(x), tap(x), strict=True))
    assert tensors_kept_on(tap.model[4]) == []


@pytest.mark.usefixtures("_fresh_compiler")
def test_tap_around_a_compiled_model_gives_the_same():
    model, x = sequential().eval(), images()
    expected, features_expected = model(x), model[:4](x)
    tap = with_features(torch.compile(model, backend="eager"))
    for _ in range(3):
        logits, features = tap(x)
        assert torch.equal(logits, expected)
        assert torch.equal(features, features_expected)


# ---- estimate_budget -------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """Returns its input as logits and notes in which mode it was called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled()))
        return x


def rows(*predicted):
    return nn.functional.one_hot(torch.tensor(predicted), 3).float()


def test_budget_is_the_exact_share_of_wrong_samples_over_unequal_batches():
    # wrong: the 2nd of 3, then both of 2: 3 of 5 (the mean of the batches' rates would be (1/3 + 1)/2 = 2/3)
    loader = [(rows(0, 1, 2), torch.tensor([0, 2, 2])), (rows(1, 1), torch.tensor([0, 2]))]
    assert estimate_budget(nn.Identity(), loader) == 3 / 5


@pytest.mark.parametrize(("shift", "budget"), [(0, 0.0), (1, 1.0)])
def test_budget_reaches_both_ends(shift, budget):
    assert estimate_budget(nn.Identity(), [(rows(0, 1, 2), (torch.tensor([0, 1, 2]) + shift) % 3)]) == budget


def test_budget_of_dense_targets_counts_positions():
    # 2 samples of 1 x 2 positions: predicted [[0, 1]] and [[2, 0]]
    logits = torch.stack([rows(0, 1), rows(2, 0)]).permute(0, 2, 1).unsqueeze(2)
    assert logits.shape == (2, 3, 1, 2)
    assert estimate_budget(nn.Identity(), [(logits, torch.tensor([[[0, 1]], [[2, 1]]]))]) == 1 / 4


@pytest.mark.parametrize(("settings", "ignored"), [({}, -100), ({"ignore_index": 255}, 255)])
def test_budget_counts_no_ignored_positions(settings, ignored):
    # 2 of 4 positions count, 1 of them is wrong
    loader = [(rows(0, 1), torch.tensor([0, ignored])), (rows(2, 2), torch.tensor([ignored, 1]))]
    assert estimate_budget(nn.Identity(), loader, **settings) == 1 / 2


@pytest.mark.parametrize("wrap", [lambda x: (x, None), lambda x: [x], lambda x: {"logits": x}, lambda x: {"out": x}])
def test_budget_of_a_student_that_returns_more_than_logits(wrap):
    class Student(nn.Module):
        def forward(self, x):
            return wrap(x)

    assert estimate_budget(Student(), [(rows(0, 1), torch.tensor([0, 0]))]) == 1 / 2


def test_budget_reads_the_first_two_entries_of_a_batch_and_refuses_nan():
    loader = [(rows(0, 1), torch.tensor([0, 0]), torch.tensor([7, 8]))]  # with an index, as a cache's dataset gives
    assert estimate_budget(nn.Identity(), loader) == 1 / 2
    with pytest.raises(ValueError, match="logits without NaN"):
        estimate_budget(nn.Identity(), [(rows(0, 1) * math.nan, torch.tensor([0, 0]))])
    ignored = torch.cat([rows(0, 1), torch.full((1, 3), math.nan)]), torch.tensor([0, 0, -100])
    assert estimate_budget(nn.Identity(), [ignored]) == 1 / 2
    with pytest.raises(TypeError, match=r"loader must yield \(x, target, ...\), got dict"):
        estimate_budget(nn.Identity(), [{"x": rows(0), "target": torch.tensor([0])}])


def test_budget_of_a_tap_is_that_of_its_model():
    model, x, target = sequential(), images(32), torch.randint(CLASSES, (32,))
    assert estimate_budget(with_features(model), [(x, target)]) == estimate_budget(model, [(x, target)])


@pytest.mark.parametrize("training", [True, False])
def test_budget_is_measured_in_eval_mode_without_gradients_and_the_mode_restored(training):
    student = nn.Sequential(Watched(), nn.Dropout(0.5)).train(training)
    estimate_budget(student, [(rows(0), torch.tensor([0]))])
    assert student[0].seen == [(False, False)]
    assert all(module.training == training for module in student.modules())
    assert torch.is_grad_enabled()


def test_budget_leaves_running_statistics_alone():
    student = sequential().train()
    before = copy.deepcopy(student.state_dict())
    estimate_budget(student, [(images(), torch.zeros(4, dtype=torch.int64))])
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_budget_leaves_a_frozen_norm_in_eval_mode():
    student = sequential().train()
    student[2].eval()
    estimate_budget(student, [(images(), torch.zeros(4, dtype=torch.int64))])
    assert student.training
    assert not student[2].training


def test_mode_is_restored_when_the_loader_raises():
    def loader():
        yield rows(0), torch.tensor([0])
        raise OSError("disk full")

    student = Watched().train()
    with pytest.raises(OSError, match="disk full"):
        estimate_budget(student, loader())
    assert student.training


@pytest.mark.parametrize(
    "loader",
    [[], [(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))], [(torch.zeros(2, 3), torch.tensor([-100, -100]))]],
    ids=["no-batch", "empty-batch", "all-ignored"],
)
def test_empty_loader_is_refused_and_the_mode_restored(loader):
    student = Watched().train()
    with pytest.raises(ValueError, match="loader must yield at least one sample"):
        estimate_budget(student, loader)
    assert student.training


def test_budget_ignored_positions_do_not_count():
    loader = [(torch.eye(3), torch.tensor([0, 2, -100]))]
    assert estimate_budget(nn.Identity(), loader) == 1 / 2
    assert estimate_budget(nn.Identity(), loader, ignore_index=2) == 1 / 2


@pytest.mark.parametrize("function", [with_features, estimate_budget])
def test_docstring_names_the_arguments_of_the_signature(function):
    assert documented_arguments(function) == list(inspect.signature(function).parameters)


def test_calling_the_model_itself_keeps_nothing_and_leaves_it_copyable():
    model = sequential()
    with_features(model)
    model(images())
    copy.deepcopy(model)
    assert not tensors_kept_on(model[4])


def test_a_first_batch_that_tells_nothing_does_not_use_the_check_up():
    tap = with_features(WithAuxiliary(CLASSES + 1).eval())
    tap(images(0))
    with pytest.raises(RuntimeError, match="layer="):
        tap(images())


def test_nan_logits_are_returned_and_not_blamed_on_the_layer():
    logits, _ = with_features(sequential().eval())(images() * torch.nan)
    assert logits.isnan().all()


def test_a_head_called_by_keyword_is_tapped():
    class ByKeyword(Classifier):
        def forward(self, x):
            return self.head(input=self.body(x))

    model, x = ByKeyword(), images()
    assert torch.equal(with_features(model)(x)[1], model.body(x))


def test_features_of_another_width_than_the_layers_are_refused():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x[..., : self.in_features])

    with pytest.raises(RuntimeError, match=r"expected \(2, 3, \.\.\.\)"):
        with_features(nn.Sequential(Odd(3, 4)), layer="0")(torch.randn(2, 6))


def test_budget_refuses_targets_that_would_broadcast():
    with pytest.raises(ValueError, match=r"shape \(4,\), got shape \(4, 1\)"):
        estimate_budget(nn.Identity(), [(torch.eye(4), torch.arange(4)[:, None])])
