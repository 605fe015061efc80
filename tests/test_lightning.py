"""DiSK in Lightning: the callback against the loop that README and docs/write_a_host.md show, on the same batches."""

import copy
import os
import socket
import sys
import types

import pytest
import torch
from torch import multiprocessing as mp
from torch import nn
from torch.nn import functional as F  # noqa: N812

from disk_plugin import DiSKLoss, DualScheduler, GuideHead
from disk_plugin.features import DKD, Guided, Method, Outputs, SimKD
from disk_plugin.features.simkd import pooled_classifier
from disk_plugin.taps import with_features
from disk_plugin.training import GuidedTraining

pl = pytest.importorskip("lightning.pytorch")

from disk_plugin.integrations.lightning import DiSKCallback  # noqa: E402

EPOCHS = 4
pytestmark = [  # Lightning's own, and of toys that are no better than chance
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:the teacher is right on:UserWarning"),
    pytest.mark.filterwarnings("ignore:in a schedule of epochs=1:UserWarning"),
]


class Student(pl.LightningModule):
    """A user's module, that knows nothing of DiSK."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
        self.own_steps = 0

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.own_steps += 1
        x, target = batch
        return F.cross_entropy(self(x), target)

    def validation_step(self, batch, batch_idx):
        x, target = batch
        self.log("val_loss", F.cross_entropy(self(x), target))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


class Similarity(Method):
    """Reads features, and trains a layer of its own."""

    reads = frozenset({"features"})

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 7)

    def forward(self, student, teacher, target):
        return {"cosine": 1 - F.cosine_similarity(self.project(student.features), teacher.features)}


def models(student=Student):
    torch.manual_seed(0)
    return student(), nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5))


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.utils.data.TensorDataset(torch.randn(24, 4, generator=generator), torch.arange(24) % 5)


def loader(size=6, **settings):
    return torch.utils.data.DataLoader(data(), batch_size=size, **settings)


def of(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


def make_disk(**settings):
    torch.manual_seed(2)
    return DiSKLoss(GuideHead(5, 7), **settings)


def trainer(folder, *callbacks, **settings):
    settings = {"max_epochs": EPOCHS, "logger": False, "enable_checkpointing": False, **settings}
    settings |= {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **settings)


def checkpoints(folder, **settings):
    return pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **settings)


def assert_equal(found, expected):
    torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def by_hand(student, teacher, guided, *, epochs=EPOCHS, accumulate=1, total=EPOCHS):
    """Train as docs/write_a_host.md does."""
    teacher = with_features(teacher.eval())
    reader = with_features(student) if guided.method else None
    training = GuidedTraining(guided, epochs=total)
    parameters = [*student.parameters(), *guided.trainable_parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    logs = []
    for epoch in range(epochs):
        training.begin_epoch(epoch)
        for index, (x, target) in enumerate(loader()):
            with torch.no_grad():
                shown = outputs(teacher, x)
            loss = training.loss(outputs(reader, x) if reader else student(x), shown, target)
            if index % accumulate == 0:
                optimizer.zero_grad()
            (loss / accumulate).backward()
            if (index + 1) % accumulate == 0:
                optimizer.step()
        scheduler.step()
        logs.append(training.end_epoch())
    return logs


def outputs(tap, x):
    return Outputs(*tap(x))


@pytest.mark.parametrize("method", [None, "dkd", "features"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_the_loop_bit_for_bit(method, accumulate, tmp_path):
    student, teacher = models()
    guided = Guided(make_disk(), {"dkd": DKD(), "features": Similarity(), None: None}[method])
    other, expected = copy.deepcopy(student), copy.deepcopy(guided)
    logs = by_hand(other, copy.deepcopy(teacher), expected, accumulate=accumulate)
    callback = DiSKCallback(teacher, guided)
    run = trainer(tmp_path, callback, accumulate_grad_batches=accumulate)
    run.fit(student, loader())
    assert_equal(student, other)
    assert_equal(callback.guided, expected)
    assert student.own_steps == 0
    for name, value in logs[-1].items():
        torch.testing.assert_close(run.callback_metrics[f"disk_{name}"], torch.tensor(value), equal_nan=True)


def test_it_is_readmes_loop(tmp_path):
    student, teacher = models()
    disk = make_disk()
    other, expected = copy.deepcopy(student), copy.deepcopy(disk)
    trainer(tmp_path, DiSKCallback(copy.deepcopy(teacher), disk)).fit(student, loader())
    tapped, optimizer = (
        with_features(teacher.eval()),
        torch.optim.SGD([*other.parameters(), *expected.parameters()], 0.1, 0.9),
    )
    scheduler, dual = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
        DualScheduler(expected, epochs=EPOCHS),
    )
    for _ in range(EPOCHS):
        for x, target in loader():
            with torch.no_grad():
                teacher_logits, features = tapped(x)
            loss = expected(other(x), teacher_logits, target, features)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        dual.step()
    torch.testing.assert_close(dict(student.state_dict()), dict(other.state_dict()))
    torch.testing.assert_close(dict(disk.state_dict()), dict(expected.state_dict()))


def test_the_teacher_is_frozen_in_evaluation_mode_and_in_no_checkpoint(tmp_path):
    student, teacher = models()
    before = copy.deepcopy(teacher.state_dict())
    modes = []
    teacher[1].register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    keys = student.state_dict().keys()
    run = trainer(tmp_path, DiSKCallback(teacher.train()), checkpoints(tmp_path), enable_checkpointing=True)
    run.fit(student, loader(), loader())
    assert set(modes) == {(False, False)}
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {id(p) for p in teacher.parameters()}.isdisjoint(map(id, student.parameters()))
    saved = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == keys
    assert saved["callbacks"]["DiSKCallback"].keys() == {"disk", "dual"}
    assert_equal(Student.load_from_checkpoint(tmp_path / "epoch=3.ckpt"), student)
    nn.Sequential(*student.net).load_state_dict(
        {name.removeprefix("net."): value for name, value in saved["state_dict"].items()}
    )


def fitted(folder, seed, *callbacks, validated=False, **settings):
    """Fit fresh models of another seed."""
    student, teacher = models()
    torch.manual_seed(seed)
    for parameter in student.parameters():
        nn.init.normal_(parameter)
    callback = DiSKCallback(teacher, DiSKLoss(GuideHead(5, 7)))
    path = settings.pop("ckpt_path", None)
    run = trainer(folder, callback, *callbacks, enable_checkpointing=bool(callbacks), **settings)
    run.fit(student, loader(), loader() if validated else None, ckpt_path=path)
    return student, callback


@pytest.mark.parametrize("stopped", [True, False])
def test_a_run_resumed_after_two_epochs_of_four_equals_the_whole_one_bit_for_bit(stopped, tmp_path):
    whole, expected = fitted(tmp_path, 3, checkpoints(tmp_path / "whole"))
    path = tmp_path / "whole/epoch=1.ckpt"
    if stopped:  # by an exception in the third epoch, in a run of its own

        class Stop(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if (trainer.current_epoch, batch_idx) == (2, 1):
                    raise InterruptedError

        with pytest.raises(InterruptedError):
            fitted(tmp_path, 3, checkpoints(tmp_path / "part"), Stop())
        path = tmp_path / "part/epoch=1.ckpt"
        assert len(list(path.parent.iterdir())) == 2
    found, callback = fitted(tmp_path, 4, checkpoints(tmp_path / "again"), ckpt_path=path)
    assert_equal(found, whole)
    assert_equal(callback.guided, expected.guided)
    assert callback.training.schedule.dual.state_dict() == expected.training.schedule.dual.state_dict()


def test_a_checkpoint_saved_by_validation_ends_its_epochs_schedule_on_resume(tmp_path):
    """Lightning saves it before the epoch's end, whose hooks a resumed run does not call."""
    at_validation = checkpoints(tmp_path, save_on_train_epoch_end=False)
    _, expected = fitted(tmp_path, 3, at_validation, validated=True)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]["DiSKCallback"]
    assert saved["dual"]["epoch"] == 1
    again = checkpoints(tmp_path / "again", save_on_train_epoch_end=False)
    _, found = fitted(tmp_path, 4, again, ckpt_path=tmp_path / "epoch=1.ckpt", validated=True)
    assert found.training.schedule.dual.state_dict() == expected.training.schedule.dual.state_dict()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before:UserWarning")  # Lightning 2.2
def test_a_run_resumed_within_an_epoch_goes_on_in_it(tmp_path):
    often = checkpoints(tmp_path, every_n_train_steps=3)  # 4 steps an epoch
    fitted(tmp_path, 3, often, max_epochs=2)
    path = next(path for path in tmp_path.glob("*.ckpt") if torch.load(path, weights_only=True)["global_step"] == 6)
    assert torch.load(path, weights_only=True)["callbacks"]["DiSKCallback"]["dual"]["epoch"] == 1
    _, found = fitted(tmp_path, 4, checkpoints(tmp_path / "again", every_n_train_steps=3), ckpt_path=path)
    assert found.training.schedule.dual.epoch == EPOCHS


def test_a_checkpoint_without_the_guide_is_not_resumed(tmp_path):
    student, teacher = models()
    trainer(tmp_path, checkpoints(tmp_path), enable_checkpointing=True, max_epochs=1).fit(student, loader())
    assert student.own_steps == 4
    run = trainer(tmp_path, DiSKCallback(teacher), checkpoints(tmp_path / "again"), enable_checkpointing=True)
    with pytest.raises(RuntimeError, match=r"epoch=0.ckpt holds no state of DiSKCallback, as it was saved without"):
        run.fit(student, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_second_fit_goes_on(tmp_path):
    student, teacher = models()
    callback = DiSKCallback(teacher, make_disk())
    run = trainer(tmp_path, callback, max_epochs=2)
    run.fit(student, loader())
    run.fit_loop.max_epochs = EPOCHS
    run.fit(student, loader())
    assert (callback.training.schedule.dual.epoch, callback.training.schedule.dual.epochs) == (EPOCHS, EPOCHS)
    trainer(tmp_path).fit(student, loader())  # without DiSK
    assert student.own_steps == 16


def test_validation_and_the_modules_own_step_are_untouched(tmp_path):
    class Shared(Student):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

    student, teacher = models(Shared)
    callback = DiSKCallback(teacher)
    run = trainer(tmp_path, callback, num_sanity_val_steps=1)
    run.fit(student, loader(), loader(24))
    assert student.own_steps == EPOCHS + 1
    positions = 24  # the validation's samples did not count
    x, target = data().tensors
    torch.testing.assert_close(run.callback_metrics["val_loss"], F.cross_entropy(student.eval()(x), target))
    assert callback.guided.disk.statistics().positions in (0, positions)
    assert "training_step" not in vars(student)
    with pytest.raises(ValueError, match="a batch must be"):
        trainer(tmp_path, callback, max_epochs=1).fit(student, of([torch.randn(2, 4)]))
    assert "training_step" not in vars(student)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_shortens_the_guides_gradient_to_the_students(algorithm, tmp_path):
    lengths = []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            groups = (list(pl_module.parameters()), list(callback.guided.parameters()))
            lengths.append([torch.tensor([p.grad.norm() for p in g if p.grad is not None]).norm() for g in groups])

    student, teacher = models()
    callback = DiSKCallback(teacher, make_disk(discount=None, multiplier=5000.0, guide_gradient_scale=None, budget=0.0))
    run = trainer(tmp_path, callback, Watch(), max_epochs=1, gradient_clip_val=0.01, gradient_clip_algorithm=algorithm)
    run.fit(student, loader())
    for of_student, of_guide in lengths[1:]:
        if algorithm == "norm":
            assert 0.01 / 2**0.5 * 0.999 <= of_student <= 0.01
        assert of_guide > 0


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("64-true", torch.float64)])
def test_precisions(precision, dtype, tmp_path):
    student, teacher = models()
    callback = DiSKCallback(teacher)
    run = trainer(tmp_path, callback, precision=precision)
    run.fit(student, loader())
    assert {p.dtype for p in student.parameters()} == {p.dtype for p in teacher.parameters()} == {dtype}
    assert run.callback_metrics["disk_logged_loss"].isfinite()


def test_the_guide_joins_a_group_of_the_optimizer(tmp_path):
    class Groups(Student):
        def configure_optimizers(self):
            return self.optimizer(
                [{"params": self.net[:2].parameters(), "lr": 0.1}, {"params": self.net[2:].parameters(), "lr": 0.2}]
            )

        def optimizer(self, groups):
            return torch.optim.AdamW(groups)

    student, teacher = models(Groups)
    callback = DiSKCallback(teacher, param_group=1)
    run = trainer(tmp_path, callback)
    run.fit(student, loader())
    guide = {id(parameter) for parameter in callback.guided.parameters()}
    inside = [guide & {id(p) for p in group["params"]} for group in run.optimizers[0].param_groups]
    assert inside == [set(), guide]
    assert all(parameter in run.optimizers[0].state for parameter in callback.guided.parameters())

    class Own(Groups):
        def optimizer(self, groups):
            return torch.optim.AdamW([*groups, {"params": callback.guided.parameters(), "lr": 0.01}])

    student, _ = models(Own)
    run = trainer(tmp_path, callback)
    run.fit(student, loader())
    assert [len(group["params"]) for group in run.optimizers[0].param_groups] == [4, 2, len(guide)]

    class Eager(Groups):
        def optimizer(self, groups):
            return torch.optim.Adagrad(groups)

    student, _ = models(Eager)
    with pytest.raises(ValueError, match="Adagrad has its state already, without the guide's"):
        trainer(tmp_path, callback).fit(student, loader())


class Two(Student):
    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net[:2], self.net[2:])]


class Manual(Student):
    automatic_optimization = False


class NoOptimizer(Student):
    def configure_optimizers(self):
        return None


class Holding(Student):
    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(4, 5)


class Hidden(Student):
    def forward(self, x):
        return {"hidden": self.net(x)}


class Blind(Student):
    def on_train_batch_start(self, batch, batch_idx):
        with torch.no_grad():
            self.training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.:UserWarning")
@pytest.mark.parametrize(
    ("student", "settings", "batches", "error", "message"),
    [
        (Manual, {}, None, RuntimeError, "DiSK replaces training_step, which manual optimization needs"),
        (NoOptimizer, {}, None, RuntimeError, "DiSK trains by one optimizer, got 0"),
        (Two, {}, None, RuntimeError, "multiple optimizers is only supported with manual"),  # Lightning's own words
        (Holding, {}, None, ValueError, "the teacher is part of the LightningModule"),
        (Hidden, {}, None, TypeError, r"the model must return logits .* got dict with keys \['hidden'\]"),
        (Blind, {}, None, RuntimeError, "training_step was called without gradients while training"),
        (Student, {"max_epochs": -1, "max_steps": 3}, None, ValueError, r"the schedule needs a number of epochs"),
        (Student, {}, [torch.randn(3, 4)], ValueError, r"a batch must be \(x, target\), got a Tensor"),
        (Student, {}, [{"x": torch.randn(3, 4)}], ValueError, r"got a dict of 1: give DiSKCallback unpack="),
        (Student, {}, [(torch.randn(3, 4), "no labels")], ValueError, "DiSK needs labels, got a target of type str"),
    ],
)
def test_what_it_cannot_train(student, settings, batches, error, message, tmp_path):
    student, teacher = models(student)
    teacher = getattr(student, "teacher", teacher)
    with pytest.raises(error, match=message):
        trainer(tmp_path, DiSKCallback(teacher), **settings).fit(student, loader() if batches is None else of(batches))
    assert "training_step" not in vars(student)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"loss": nn.CrossEntropyLoss()}, TypeError, "loss must be a DiSKLoss or a Guided, got CrossEntropyLoss"),
        ({"loss": make_disk(), "temperature": 4}, TypeError, r"\['temperature'\] are settings of a loss"),
        ({"temprature": 4}, TypeError, "temprature"),
        ({"teacher": "resnet50"}, TypeError, "teacher must be a Module, got str"),
        (
            {"loss": Guided(make_disk(), SimKD(3, 8, pooled_classifier(nn.Linear(8, 5)), teacher_size=(4, 4)))},
            ValueError,
            r"SimKD reads \['last'\]",
        ),
    ],
)
def test_what_it_cannot_be_built_from(given, error, message):
    with pytest.raises(error, match=message):
        DiSKCallback(**{"teacher": models()[1], **given})


def test_batches_of_another_shape_and_soft_labels(tmp_path):
    student, teacher = models()
    x, target = data().tensors
    batches = [{"image": x, "label": F.one_hot(target, 5).float()}]
    callback = DiSKCallback(teacher, unpack=lambda batch: (batch["image"], batch["label"]), temperature=4, epochs=7)
    trainer(tmp_path, callback).fit(student, of(batches))
    assert callback.training.schedule.dual.epochs == 7
    assert callback.guided.disk.temperature == 4


class NoNorm(Student):
    """Of the whole batch, and not of each process's part."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))


class Trained(Method):
    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(5, 5)

    def forward(self, student, teacher, target):
        return {"error": (self.scale(student.logits) - teacher.logits).square().mean(1)}


def train_some(folder, name, batches, *, seed=0, **settings):
    student, teacher = models(NoNorm)
    torch.manual_seed(seed)
    callback = DiSKCallback(teacher, Guided(DiSKLoss(GuideHead(5, 7)), Trained(), logit_loss=True))
    run = trainer(folder, callback, max_epochs=2, **settings)
    run.fit(student, batches)
    torch.save([student.state_dict(), callback.guided.state_dict(), dict(run.callback_metrics)], f"{folder}/{name}")


def process(rank, folder, port):
    """What torchrun starts; each process has other guides at first."""
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="1")
    sampler = torch.utils.data.DistributedSampler(data(), 2, rank, shuffle=False)  # Lightning's own shuffles
    settings = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    train_some(folder, rank, loader(3, sampler=sampler), seed=rank, **settings)


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, (str(tmp_path), port), nprocs=2)
    train_some(str(tmp_path), "whole", loader(6))
    first, second, whole = (torch.load(tmp_path / name, weights_only=True) for name in ("0", "1", "whole"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("version", "message"),
    [("2.1.9", r"needs .* >= 2.2, got 2.1.9: pip install 'lightning>=2.2'"), (None, "found none")],
)
def test_a_host_that_is_absent_or_too_old_is_named_with_the_pip_line(version, message, monkeypatch):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        old = None if version is None else types.SimpleNamespace(__version__=version, __name__=name)
        monkeypatch.setitem(sys.modules, name, old)
    monkeypatch.delitem(sys.modules, "disk_plugin.integrations.lightning")
    with pytest.raises(ImportError, match=message):
        import disk_plugin.integrations.lightning  # noqa: F401
