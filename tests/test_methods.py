"""Methods: DKD against a loop over classes, weighting of any loss, all in a plain loop, resumed; the docs' own."""

import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from disk_plugin import DiSKLoss, GuideHead
from disk_plugin.features import CIFD, DKD, METHODS, Guided, Method, Outputs, Pair, ScaleKD, SimKD
from disk_plugin.features.cifd import RateDistortionModule
from disk_plugin.features.launching import explained, import_methods, settings_of
from disk_plugin.features.simkd import pooled_classifier
from disk_plugin.taps import TeacherTail, get_tail
from disk_plugin.taps.classifier import check_classifier
from disk_plugin.training import GuidedTraining, Recipe, Schedule
from disk_plugin.training.guide_passes import repeated
from disk_plugin.uniform import UniformGuide

DOCS = Path(__file__).parents[1] / "docs"
C, D, N = 5, 8, 6


@pytest.fixture
def my_methods(tmp_path, monkeypatch):
    """The module of docs/write_a_method.md, as a user would save it."""
    (source,) = re.findall(
        r"```python\n# my_methods\.py\n(.*?)```", (DOCS / "write_a_method.md").read_text(), re.DOTALL
    )
    (tmp_path / "my_methods.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    yield import_methods(["my_methods"], METHODS, flag="--import")
    sys.modules.pop("my_methods", None)


# ---- DKD -------------------------------------------------------------------------------------------------------------


def dkd_by_hand(student, teacher, label, alpha, beta, temperature):
    """Zhao et al. (CVPR 2022), eq. (5) to (7), one sample, in floats."""

    def softmax(logits):
        powers = [math.exp(value / temperature) for value in logits]
        return [power / sum(powers) for power in powers]

    s, t = softmax(student), softmax(teacher)
    tckd = t[label] * math.log(t[label] / s[label]) + (1 - t[label]) * math.log((1 - t[label]) / (1 - s[label]))
    nckd = 0.0
    for c in range(len(s)):
        if c != label:
            among = [values[c] / (1 - values[label]) for values in (t, s)]
            nckd += among[0] * math.log(among[0] / among[1])
    return temperature**2 * (alpha * tckd + beta * nckd)


@pytest.mark.parametrize("seed", range(5))
def test_dkd_is_the_paper_sample_by_sample(seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, N, C, generator=generator, dtype=torch.double)
    target = torch.randint(C, (N,), generator=generator)
    settings = {"alpha": 0.7, "beta": 3.0, "temperature": 2.5}
    found = DKD(ce_weight=0.3, **settings)(Outputs(student), Outputs(teacher), target)
    rows = zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True)
    expected = torch.tensor([dkd_by_hand(s, t, y, **settings) for s, t, y in rows], dtype=torch.double)
    torch.testing.assert_close(found["dkd"], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["ce"], 0.3 * F.cross_entropy(student, target, reduction="none"))


def test_dkds_mean_is_what_mdistillers_users_know():
    from distillation import dkd_loss

    student, teacher = torch.randn(2, N, C, dtype=torch.double).unbind()
    student.requires_grad_()
    target = torch.arange(N) % C
    losses = DKD()(Outputs(student), Outputs(teacher), target)
    ours, theirs = sum(loss.mean() for loss in losses.values()), dkd_loss(student, teacher, target)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_dkd_warms_up_only_where_it_is_told_of_an_epoch():
    dkd, (student, teacher), target = DKD(warmup_epochs=4), torch.randn(2, N, C), torch.arange(N) % C
    whole = dkd(Outputs(student), Outputs(teacher), target)["dkd"]
    for epoch, share in ((0, 0.25), (2, 0.75), (3, 1.0), (9, 1.0)):
        dkd.begin_epoch(epoch)
        torch.testing.assert_close(dkd(Outputs(student), Outputs(teacher), target)["dkd"], share * whole)


def test_dkd_of_extreme_logits_two_classes_and_ignored_positions_is_finite():
    for scale, classes in ((1e4, C), (1.0, 2)):
        student, teacher = scale * torch.randn(2, N, classes, 3)
        student[0, 0], teacher[1, 0] = torch.nan, torch.inf
        student = student.clone().requires_grad_()
        target = torch.randint(classes, (N, 3))
        target[:2] = -100
        losses = DKD()(Outputs(student), Outputs(teacher), target)
        (gradient,) = torch.autograd.grad(sum(loss.sum() for loss in losses.values()), student)
        assert all(loss.isfinite().all() and not loss[:2].any() for loss in losses.values())
        assert gradient.isfinite().all()
        assert not gradient[:2].any()


def test_dkd_takes_probabilities_and_half_precision():
    student, teacher, target = torch.randn(N, C), torch.randn(N, C), torch.randn(N, C).softmax(1)
    found = DKD()(Outputs(student), Outputs(teacher), target)
    hard = DKD()(Outputs(student), Outputs(teacher), target.argmax(1))
    torch.testing.assert_close(found["dkd"], hard["dkd"])
    torch.testing.assert_close(found["ce"], F.cross_entropy(student, target, reduction="none"))
    assert DKD()(Outputs(student.bfloat16()), Outputs(teacher.bfloat16()), target)["dkd"].dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DKD(temperature=0.0), ValueError, "temperature must be > 0, got 0.0"),
        (lambda: DKD(beta=-1.0), ValueError, "beta must be >= 0, got -1.0"),
        (lambda: DKD(warmup_epochs=1.5), TypeError, "warmup_epochs must be an int, got float 1.5"),
        (lambda: Guided(nn.Linear(1, 1)), TypeError, "disk must be a DiSKLoss, got Linear"),
        (lambda: Guided(disk(), 3), TypeError, "method must be a Method or a callable, got int"),
        (lambda: Guided(disk(), weight="half"), ValueError, "weight must be one of"),
        (lambda: Guided(disk(), method_weight=-1.0), ValueError, "method_weight must be >= 0, got -1.0"),
        (
            lambda: Guided(disk(), lambda s, t, y: s.mean())(*batch()),
            ValueError,
            r"loss must have shape \(6,\), got \(\)",
        ),
        (lambda: Method()(None, None, None), NotImplementedError, "Method needs forward"),
        (lambda: GuidedTraining(Guided(disk()), recipe=Recipe()), ValueError, "needs recipe and guide_optimizer"),
        (lambda: GuidedTraining(Guided(disk()), epochs=2, schedule=Schedule(None)), ValueError, "instead of epochs"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- weighting of any loss -------------------------------------------------------------------------------------------


def disk(**settings):
    return DiSKLoss(GuideHead(C), **{"budget": 0.2, "multiplier": 5.0, **settings})


def batch(*dense, dtype=torch.float32):
    student, teacher = torch.randn(2, N, C, *dense, dtype=dtype).unbind()
    return student.requires_grad_(), teacher, torch.randint(C, (N, *dense))


def mse(student, teacher, target):
    return (student - teacher).square().mean(1)


def frozen_methods():
    """Each method that holds what is not trained, and that part."""
    tail = TeacherTail(nn.Conv2d(8, 12, 2, stride=2).eval(), (8, 4, 4), (12, 2, 2))
    scalekd = ScaleKD((6, 4, 4), (6, 2, 2), tail, proxy_heads=2, main_heads=2)
    simkd = SimKD(6, 8, pooled_classifier(nn.Linear(8, C)), teacher_size=(2, 2))
    cifd = CIFD(D, 12, rdms=RateDistortionModule(12, C, distortion_weights=(10.0,)), allow_unfitted=True)
    return {"scalekd": (scalekd, tail), "simkd": (simkd, simkd.classifier), "cifd": (cifd, cifd.embeddings.rdms)}


@pytest.mark.parametrize("name", ["scalekd", "simkd", "cifd"])
@pytest.mark.parametrize("whole", [False, True])
def test_what_a_method_keeps_frozen_stays_so_when_it_is_frozen_and_released(name, whole):
    method, kept = frozen_methods()[name]
    guided = Guided(DiSKLoss(GuideHead(C)), method)
    expected = [id(parameter) for parameter in guided.trainable_parameters()]
    module = guided if whole else method
    assert module.requires_grad_(False) is module
    assert not any(parameter.requires_grad for parameter in module.parameters())
    module.requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in kept.parameters())
    assert [id(parameter) for parameter in guided.trainable_parameters()] == expected
    nn.ModuleList([guided]).requires_grad_(True)  # which asks no module
    assert [id(parameter) for parameter in guided.trainable_parameters()] == expected


def test_a_uniform_weight_is_the_method_itself_and_a_weight_scales_each_sample():
    guided = Guided(disk(), mse, weight="uniform", method_weight=0.5)
    student, teacher, target = batch()
    (found,) = torch.autograd.grad(guided(student, teacher, target), student)
    (expected,) = torch.autograd.grad(0.5 * mse(student, teacher, target).mean(), student)
    assert torch.equal(found, expected)
    terms = Guided(guided.disk, mse).terms(student, teacher, target, reduction="none")
    torch.testing.assert_close(terms.feature, ((1 - terms.disk.guide) * mse(student, teacher, target)).detach())


def test_the_guide_learns_from_its_own_objective_alone():
    guided, (student, teacher, target) = Guided(disk(), mse), batch()
    parameters = list(guided.disk.parameters())
    found = torch.autograd.grad(guided(student, teacher, target), parameters)
    expected = torch.autograd.grad(guided.disk.terms(student, teacher, target).guide_loss, parameters)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dense", [(), (3,)])
def test_ignored_positions_and_weights_count_as_in_the_samples_alone(dense):
    guided, (student, teacher, target) = Guided(disk(discount=None), DKD(), logit_loss=True), batch(*dense)
    weight = torch.rand(N)
    guided.eval()
    kept = torch.tensor([0, 2, 3, 5])
    some = target.clone()
    some[[1, 4]] = -100
    whole = guided.terms(student, teacher, some, sample_weight=weight)
    part = guided.terms(student[kept], teacher[kept], target[kept], sample_weight=weight[kept])
    torch.testing.assert_close(whole.student_loss, part.student_loss)
    torch.testing.assert_close(whole.feature, part.feature)
    zero = guided.terms(student, teacher, target, sample_weight=torch.zeros(N))
    assert zero.student_loss.item() == 0.0


def test_a_loss_that_is_not_to_be_weighed_is_not():
    class Both(Method):
        unguided = frozenset({"rate"})

        def forward(self, student, teacher, target):
            return {"rate": torch.ones(len(target)), "error": torch.ones(len(target))}

    terms = Guided(disk(), Both(), weight="guide").terms(*batch(), reduction="none")
    torch.testing.assert_close(terms.feature, 1 + terms.disk.guide)


def test_without_a_method_it_is_disk_bit_for_bit():
    guided, inputs = Guided(disk()), batch()
    terms, expected = guided.terms(*inputs), guided.disk.terms(*inputs, reduction="none").mean()
    assert torch.equal(terms.loss, expected.loss)
    assert torch.equal(terms.student_loss, expected.student_loss)
    assert torch.equal(terms.logged_loss, expected.logged_loss)
    assert all(torch.equal(one, other) for one, other in zip(terms.disk, expected, strict=True))


def test_features_for_the_method_alone_do_not_reach_a_guide_that_reads_none():
    class Cosine(Method):
        reads = frozenset({"features"})

        def forward(self, student, teacher, target):
            return {"cosine": 1 - F.cosine_similarity(student.features, teacher.features)}

    student, teacher, target = batch()
    features = torch.randn(2, N, D)
    guided = Guided(disk(), Cosine())
    assert guided(Outputs(student, features[0]), Outputs(teacher, features[1]), target).isfinite()


class ReadsBoth(nn.Module):
    """A guide that is no GuideHead and reads both."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C + D, 1)

    def forward(self, teacher_logits, teacher_features):
        return self.linear(torch.cat([teacher_logits, teacher_features], 1)).squeeze(1)


def test_a_guide_of_ones_own_gets_the_features_that_its_signature_takes():
    student, teacher, target = batch()
    outputs = Outputs(teacher, torch.randn(N, D))
    assert Guided(DiSKLoss(ReadsBoth()))(student, outputs, target).isfinite()
    assert Guided(DiSKLoss(nn.Sequential(nn.Linear(C, 1), nn.Flatten(0))))(student, outputs, target).isfinite()
    assert Guided(DiSKLoss(UniformGuide(0.1)))(student, outputs, target).isfinite()


# ---- launching -------------------------------------------------------------------------------------------------------


def test_settings_and_their_help_come_from_the_class(my_methods):
    assert settings_of(SimKD) == {"factor": 2}
    assert settings_of(my_methods["hints"]) == {"bias": True}
    assert explained(my_methods["hints"], "bias") == "of the regressor"
    assert explained(DKD, "alpha") == "weight of the target-class part, >= 0"
    assert explained(DKD, "unknown_one") == "unknown one"


def test_modules_that_cannot_be_imported_or_take_a_name_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ImportError, match="--import must name a module that can be imported, got no_such: No module"):
        import_methods(["no_such"], METHODS, flag="--import")
    module = types.ModuleType("takes_a_name")
    exec("from disk_plugin.features import Method\nclass DKD(Method): pass", vars(module))
    monkeypatch.setitem(sys.modules, "takes_a_name", module)
    with pytest.raises(ValueError, match="--import takes_a_name defines DKD, but dkd is there already: rename"):
        import_methods(["takes_a_name"], METHODS, flag="--import")
    monkeypatch.setitem(sys.modules, "defines_none", types.ModuleType("defines_none"))
    assert import_methods(["defines_none"], METHODS, flag="--import") == {}


# ---- a plain loop ----------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A network that shows its last map."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, C)

    def forward(self, x):
        last = self.conv(x).relu()
        features = last.mean((2, 3))
        return Outputs(self.fc(features), features, {"last": last})


class Staged(nn.Module):
    """A network of two stages, named as a tail is found, that shows the map of each."""

    def __init__(self, width):
        super().__init__()
        self.layer3, self.layer4 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 2, stride=2)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * width, C)

    def forward(self, x):
        before = self.layer3(x)
        last = self.layer4(before)
        features = self.avgpool(last).flatten(1)
        return Outputs(self.fc(features), features, {"before_last": before, "last": last})


def networks(kind):
    """A student and a teacher for a method."""
    return (Staged(4), Staged(8).eval()) if kind is ScaleKD else (Small(4), Small(6).eval())


def built(kind, student, teacher):
    """A method for the pair, None for DiSK itself."""
    if kind is None:
        return None
    shown = [model(torch.randn(2, 3, 4, 4)) for model in (student, teacher)]

    def head():
        classifier = pooled_classifier(teacher.fc)
        check_classifier(classifier, shown[1].maps["last"], shown[1].logits)
        return classifier

    def tail(**options):
        return get_tail(teacher, torch.randn(2, 3, 4, 4), **options)

    return kind.for_pair(Pair(*shown, head, tail))


class Run:
    """README's loop around the training core."""

    def __init__(self, kind, mode, epochs=4):
        torch.manual_seed(0)
        self.student, self.teacher = networks(kind)
        method = built(kind, self.student, self.teacher)
        guided = Guided(DiSKLoss(GuideHead(C, self.teacher.fc.in_features), budget=0.3), method, logit_loss=True)
        own = {}
        if mode != "joint":
            own = {"recipe": Recipe(guide_passes=1, student_passes=2, replay=mode == "replay", replay_batch_size=4)}
            own["guide_optimizer"] = torch.optim.SGD(guided.disk.guide.parameters(), lr=0.1, momentum=0.9)
        self.training = GuidedTraining(guided, epochs=epochs, **own)
        method = [] if guided.method is None else guided.method.trainable_parameters()
        trained = [*self.student.parameters(), *method, *(guided.disk.parameters() if mode == "joint" else [])]
        self.optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
        x = torch.randn(12, 3, 4, 4)
        target = torch.arange(12) % C
        target[3] = -100
        self.loader = [(x[index], target[index]) for index in torch.arange(12).split(4)]
        self.logs = []

    def show(self, given):
        x, target = given
        self.student.eval()
        with torch.no_grad():
            teacher = self.teacher(x)
        return self.student(x), teacher, target

    def epochs(self, first, last):
        for epoch in range(first, last):
            self.training.begin_epoch(epoch)
            self.training.run_guide_passes(self.loader, self.show)
            for given in self.loader:
                student, teacher, target = self.show(given)
                self.student.train()
                loss = self.training.loss(student, teacher, target)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            self.logs.append(self.training.end_epoch())
        return self

    def state(self):
        parts = {"student": self.student.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**parts, "training": self.training.state_dict()}

    def load(self, state):
        self.student.load_state_dict(state["student"])
        self.training.load_state_dict(state["training"])
        self.optimizer.load_state_dict(state["optimizer"])
        return self


def flat(state, path=""):
    if isinstance(state, dict):
        return {key: value for name, part in state.items() for key, value in flat(part, f"{path}.{name}").items()}
    if isinstance(state, list | tuple):
        return flat(dict(enumerate(state)), path)
    return {path: state}


@pytest.mark.parametrize("mode", ["joint", "alternating", "replay"])
@pytest.mark.parametrize("name", ["disk", "simkd", "dkd", "scalekd", "hints"])
@pytest.mark.filterwarnings("ignore:the guide is dead:UserWarning")
def test_every_method_in_every_mode_trains_and_a_resumed_run_equals_an_uninterrupted_one(
    name, mode, my_methods, tmp_path
):
    kind = {"disk": None, **METHODS, **my_methods}[name]
    whole = Run(kind, mode)
    before = [parameter.clone() for parameter in whole.training.disk.parameters()]
    student = [parameter.clone() for parameter in whole.student.parameters()]
    whole.epochs(0, 4)
    assert any(not torch.equal(*pair) for pair in zip(before, whole.training.disk.parameters(), strict=True))
    assert any(not torch.equal(*pair) for pair in zip(student, whole.student.parameters(), strict=True))
    assert all(math.isfinite(log[key]) for log in whole.logs for key in ("usage", "logged_loss", "distill"))
    torch.save(Run(kind, mode).epochs(0, 2).state(), tmp_path / "half.pt")
    resumed = Run(kind, mode).load(torch.load(tmp_path / "half.pt", weights_only=True)).epochs(2, 4)
    ends = [flat(run.state()) for run in (whole, resumed)]
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]) if isinstance(value, torch.Tensor) else value == ends[1][key], key


def test_a_state_of_another_mode_is_refused():
    with pytest.raises(RuntimeError, match=r"must hold \['disk', 'dual', 'guide_passes'\], got \['disk', 'dual'\]"):
        Run(None, "alternating").training.load_state_dict(Run(None, "joint").training.state_dict())


def test_alternation_leaves_the_guide_alone_in_the_students_step_and_the_student_in_the_guides():
    run = Run(DKD, "alternating")
    run.training.begin_epoch(0)
    student = [value.clone() for value in run.student.state_dict().values()]
    guide = [value.clone() for value in run.training.disk.guide.state_dict().values()]
    assert run.training.run_guide_passes(run.loader, run.show) == 1
    assert all(map(torch.equal, student, run.student.state_dict().values()))
    moved = run.training.disk.guide.state_dict().values()
    assert not all(map(torch.equal, guide, moved))
    moved = [value.clone() for value in moved]
    loss = run.training.loss(*run.show(run.loader[0]))
    loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in run.training.disk.parameters())
    assert all(map(torch.equal, moved, run.training.disk.guide.state_dict().values()))


def test_guide_passes_leave_the_methods_statistics_and_mode_as_they_were():
    run = Run(SimKD, "alternating")
    run.training.begin_epoch(0)
    method = run.training.guided.method
    before = [value.clone() for value in method.state_dict().values()]
    run.training.run_guide_passes(run.loader, run.show)
    assert all(map(torch.equal, before, method.state_dict().values()))
    assert method.projector.training
    assert not method.classifier.training


def test_guide_passes_put_the_random_numbers_back():
    run = Run(None, "alternating")
    run.training.begin_epoch(0)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)

    class Drawing(list):
        def __iter__(self):
            torch.rand(5)
            return super().__iter__()

    run.training.run_guide_passes(Drawing(run.loader), run.show)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", ["loader", "sampler", "batch sampler"])
def test_guide_passes_leave_the_order_of_a_loader_with_its_own_generator(kind):
    data, generator = TensorDataset(torch.arange(8)), torch.Generator().manual_seed(0)
    sampler = RandomSampler(data, generator=generator)
    loader = {
        "loader": lambda: DataLoader(data, batch_size=4, shuffle=True, generator=generator),
        "sampler": lambda: DataLoader(data, batch_size=4, sampler=sampler),
        "batch sampler": lambda: DataLoader(data, batch_sampler=BatchSampler(sampler, 4, drop_last=False)),
    }[kind]()
    state = generator.get_state()
    expected = [x.tolist() for (x,) in loader]
    generator.set_state(state)
    orders = [[x.tolist() for (x,) in batches] for batches in repeated(loader)(3)]
    assert len({str(order) for order in orders}) == 3
    assert [x.tolist() for (x,) in loader] == expected
