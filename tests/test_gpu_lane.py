"""The GPU lane on the CPU: its steps are torch's, a cut run goes on bit for bit, what comes first, what it writes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from evidence import shown
from gpu_lane import graphs, packed, protocol, report, students
from gpu_lane.methods import METHODS, REFERENCE, made
from gpu_lane.runs import Plan, Run
from gpu_lane.sgd import SGD, cosine
from gpu_lane.store import Guard, Results, Store
from gpu_lane.students import Data, Students, network
from gpu_lane.views import DeviceViews
from small_images import data
from small_images.resnet import ResNet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from disk_plugin import presets
from disk_plugin.functional import _positions

ROOT = Path(__file__).parents[1]
NAMES = ["ce", "kd-2", "disk-2", "uniform-2", "paper"]
pytestmark = pytest.mark.filterwarnings("ignore:the guide is dead:UserWarning")


@pytest.fixture(scope="module")
def splits():
    return data.synthetic(144)


@pytest.fixture(scope="module")
def views(splits):
    torch.manual_seed(1)
    return DeviceViews(splits[0], 2, ResNet("resnet10-s").eval().requires_grad_(False))


def methods(names=NAMES, epochs=4):
    return {name: made(name, feature_dim=64, epochs=epochs, budget=0.3, samples=120, seed=0) for name in names}


def run_of(views, splits, folder, epochs=4, names=NAMES):
    torch.manual_seed(3)
    start = ResNet("resnet10-xxs").state_dict()
    plan = Plan("resnet10-xxs", epochs, 0, batch_size=40)
    own = methods(names, epochs)
    return Run("students", plan, own, start, views, splits[1], Store(folder / "state.pt"), ("CUDA graph",))


class Until(Guard):
    """Over after it was asked so often."""

    def __init__(self, asked):
        super().__init__(0.0)
        self.left = asked

    @property
    def over(self):
        self.left -= 1
        return self.left < 0


def test_sgd_with_its_rate_in_a_tensor_is_torchs():
    ours, theirs = ([torch.nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(0)))] for _ in range(2))
    optimizer = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule, own = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5), SGD(ours)
    for rate in cosine(0.1, 5):
        gradient = torch.randn(3)
        theirs[0].grad = gradient.clone()
        optimizer.step()
        schedule.step()
        own.step([gradient], rate)
    torch.testing.assert_close(ours, theirs)


@pytest.fixture
def joint():
    """A step of all methods on random data."""
    torch.manual_seed(0)
    own = methods()
    model = network("resnet10-xxs", [ResNet("resnet10-xxs").state_dict()] * len(own), "cpu", dense=False)
    source = Data(torch.arange(120) % 100, torch.Size((3, 32, 32)), 64, 100, 40)
    source.load(torch.randint(256, (120, 3, 32, 32), dtype=torch.uint8), (torch.randn(120, 100), torch.randn(120, 64)))
    return Students(model.train(), own, source, torch.full((12,), 0.1))


def test_a_step_is_that_of_each_method_alone(joint):
    """Each student as torch would train it: its own network, one backward, one SGD over student and guide."""
    whole = dict(zip(joint.methods, joint.states().values(), strict=True))
    batch = joint.source.next()
    joint.source.begin(torch.arange(120))
    for name, own in methods().items():
        student = ResNet("resnet10-xxs")
        student.load_state_dict(whole[name])
        with students.precision("cpu"):
            logits = student.train()(batch.images)
        own(logits.float(), batch).backward()
        parameters = [*student.parameters(), *(own.parameters() if name != "paper" else [])]
        torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4).step()
        whole[name] = student.state_dict(), own
    joint.step()
    for name, state in joint.states().items():
        expected, own = whole[name]
        for key, value in state.items():
            torch.testing.assert_close(value, expected[key], rtol=0.02, atol=2e-3)
        torch.testing.assert_close(list(joint.methods[name].parameters()), list(own.parameters()), rtol=1e-3, atol=1e-4)


def test_dense_convolutions_are_the_grouped_ones(joint):
    states = list(joint.states().values())
    for state in states:
        for value in state.values():
            if value.is_floating_point():
                value += 0.05 * torch.rand_like(value)
    images, found = torch.randn(4, 3, 32, 32), []
    for dense in (False, True):
        model = network("resnet10-xxs", states, "cpu", dense=dense)
        logits = model(images)
        found.append([logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))])
        assert list(model.state_dict()) == list(ResNet("resnet10-xxs").state_dict())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
    kinds = [type(module) for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert kinds.count(students.BlockDiagonalConv2d) == len(kinds) - 1  # all but the stem, which the copies share
    assert isinstance(students.dense_is_faster("resnet10-xxs", states, 2, "cpu", repeats=1), bool)


class Waiting(TorchDispatchMode):
    """Notes what would wait for a device, or copy a number to it: neither can be part of a CUDA graph."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "lift_fresh")):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_steps_read_no_number_and_make_no_tensor_away_from_their_data(joint, monkeypatch):
    joint.step()
    monkeypatch.setattr(_positions, "transformed", lambda: True)  # the branch that is taken off the CPU
    losses = torch.zeros(())
    # what names no device lands on meta, which no operation takes beside these tensors
    with torch.device("meta"), Waiting() as waiting:
        joint.step()
        joint.guide_step(joint.methods["paper"], losses)
    assert waiting.seen == []
    assert all(tensor.device.type == "cpu" and tensor.isfinite().all() for tensor in (*joint.state()[:-3], losses))


def test_steps_change_their_state_alone(joint):
    """A recording restores the state after its trial steps, so nothing else may have moved."""
    joint.step()
    before = [tensor.clone() for tensor in joint.state()]
    joint.step()
    after = [tensor.clone() for tensor in joint.state()]
    graphs._restore(joint.state(), before)
    joint.step()
    assert all(torch.equal(one, other) for one, other in zip(joint.state(), after, strict=True))
    assert not torch.equal(after[0], before[0])


class StandInCuda:
    """CUDA's streams and graphs, as far as a recording goes."""

    amp = torch.cuda.amp  # autocast of torch 2.4 asks for this and the next

    def is_available(self):
        return False

    def __init__(self):
        self.recording, self.waits = None, []

    def Stream(self):  # noqa: N802
        return types.SimpleNamespace(wait_stream=lambda other: self.waits.append(other))

    def current_stream(self):
        return self.Stream()

    def stream(self, stream):
        return contextlib.nullcontext()

    def CUDAGraph(self):  # noqa: N802
        return types.SimpleNamespace(replay=None)

    @contextlib.contextmanager
    def graph(self, graph):
        self.recording = graph
        yield
        self.recording = None


@pytest.fixture
def cuda(monkeypatch):
    stand_in = StandInCuda()
    monkeypatch.setattr(torch, "cuda", stand_in)
    return stand_in


@pytest.mark.parametrize("parallel", [False, True])
def test_a_recorded_step_goes_on_from_the_state_before_it_was_recorded(joint, cuda, parallel):
    joint.streams = [cuda.Stream() for _ in joint.methods]
    start = [tensor.clone() for tensor in joint.state()]
    for _ in range(3):
        joint.step()
    expected = [tensor.clone() for tensor in joint.state()]
    graphs._restore(joint.state(), start)

    def step():
        if cuda.recording is not None:
            cuda.recording.replay = step
        else:
            joint.step(parallel)

    graph = graphs._graph(step, joint.state(), start, joint.losses)
    graphs._restore(joint.state(), start)
    for _ in range(3):
        graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(joint.state(), expected, strict=True))
    forks = 2 * len(joint.methods) * parallel  # each branch waits, and is waited for
    assert len(cuda.waits) == 2 + forks * 9


def test_a_recording_that_misses_a_part_is_refused(joint, cuda):
    start = [tensor.clone() for tensor in joint.state()]

    def step():
        if cuda.recording is not None:
            cuda.recording.replay = lambda: joint.losses.add_(1.0)  # and nothing is trained
        else:
            joint.step()

    with pytest.raises(RuntimeError, match="replayed steps must have the losses"):
        graphs._graph(step, joint.state(), start, joint.losses)


def test_every_way_that_fails_is_told_and_the_next_is_taken(monkeypatch):
    state, losses, tried = [torch.zeros(3)], torch.zeros(1, device="meta"), []

    def failing(step, state, before, losses):
        state[0] += 1
        tried.append(step)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "_graph", failing)
    with pytest.warns(UserWarning, match="no CUDA graph.*not permitted"):
        _, how = graphs.recorded(lambda parallel: None, state, losses)
    assert (how, len(tried), state[0].tolist()) == (graphs.EAGER, 2, [0.0] * 3)


@pytest.mark.parametrize(("found", "same"), [(10.1, True), (10.5, False), (float("nan"), False)])
def test_a_recording_with_other_losses_is_refused(found, same):
    assert graphs.alike([1.0, found], [1.0, 10.0]) is same


GUIDED = ["disk-2", "uniform-2", "paper"]


@pytest.fixture(scope="module")
def whole(views, splits, tmp_path_factory):
    run = run_of(views, splits, tmp_path_factory.mktemp("whole"), names=GUIDED)
    assert run.fit(Guard(1e9))
    return run


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_was_cut_goes_on_bit_for_bit(views, splits, tmp_path, whole, stop):
    assert not run_of(views, splits, tmp_path, names=GUIDED).fit(Until(stop))
    second = run_of(views, splits, tmp_path, names=GUIDED)
    assert second.epoch == stop
    assert second.fit(Guard(1e9))
    assert second.logs == whole.logs
    pairs = zip(second.students.state(), whole.students.state(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_state_of_other_settings_is_not_taken_up(views, splits, tmp_path):
    run_of(views, splits, tmp_path, names=["ce"]).fit(Until(1))
    assert run_of(views, splits, tmp_path, names=["ce"]).epoch == 1
    assert run_of(views, splits, tmp_path, names=["ce"], epochs=5).epoch == 0
    assert run_of(views, splits, tmp_path, names=["kd-2"]).epoch == 0


def test_the_papers_guide_moves_in_its_own_passes_alone(views, splits, tmp_path):
    run = run_of(views, splits, tmp_path, names=["paper"])
    moved = []
    while run.epoch < 4:
        before = [parameter.clone() for parameter in run.students.methods["paper"].parameters()]
        run.fit(Until(1))
        after = run.students.methods["paper"].parameters()
        moved.append(any(not torch.equal(one, other) for one, other in zip(after, before, strict=True)))
    assert moved == [True, False, True, False]


def dry(tmp_path, *flags):
    return protocol.arguments(["--dry-run", "--device", "cpu", "--out", str(tmp_path), *flags])


def test_the_most_important_comes_first(tmp_path, monkeypatch):
    args = dry(tmp_path)
    args.students, args.seeds, order = protocol.STUDENTS, 3, []
    lane = protocol.Protocol(args, Guard(1e9))

    def students_of(student, seed, names):
        order.append((student, seed, names))
        return True

    monkeypatch.setattr(lane, "_students", students_of)
    lane.results.rows = [{"student": "resnet10-xxs", "seed": 1, "method": name} for name in ("ce", "paper")]
    assert lane.run()
    rest = [name for name in METHODS if name not in ("ce", "paper")]
    seeds = [("resnet10-xxs", seed) for seed in range(3)] + [("resnet10-s", seed) for seed in range(3)]
    assert [each[:2] for each in order] == seeds
    assert [each[2] for each in order] == [list(METHODS), rest, *[list(METHODS)] * 4]


def test_results_come_one_by_one_and_a_second_call_adds_what_is_missing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lane = protocol.Protocol(dry(tmp_path, "--methods", "ce", "kd-1"), Until(5))
        assert not lane.run()  # the teacher's two epochs, the warm start's two, one of the students
    assert not (tmp_path / "results.jsonl").exists()
    assert {name: row["epochs"] for name, row in lane.unfinished.items()} == {"ce": 1, "kd-1": 1}
    lane = protocol.Protocol(dry(tmp_path, "--methods", "ce", "kd-1"), Until(1))
    assert lane.run()  # the last epoch is what was left
    assert protocol.Protocol(dry(tmp_path, "--methods", "ce", "kd-1"), Until(0)).run()  # nothing is
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["student"], row["seed"], row["method"]) for row in rows] == [
        ("resnet10-xxs", 0, "ce"),
        ("resnet10-xxs", 0, "kd-1"),
    ]
    for row in rows:
        assert row["protocol"]["data"].startswith("random images")
        assert row["epochs"] == row["protocol"]["epochs"] == 2
        assert (row["device"], row["torch"], row["step"]) == ("CPU", torch.__version__, graphs.EAGER)
        assert row["accuracy"] == row["accuracies"][-1][1]
        assert row["seconds"] > 0
        assert row["settings"] == METHODS[row["method"]][1]


def test_results_of_another_protocol_are_not_mixed_in(tmp_path):
    results = Results(tmp_path / "results.jsonl", {"epochs": 200})
    results.add({"student": "resnet10-xxs", "seed": 0, "method": "ce", "accuracy": 1.0})
    assert Results(tmp_path / "results.jsonl", {"epochs": 200}).missing("resnet10-xxs", 0, ["ce", "kd-1"]) == ["kd-1"]
    with pytest.raises(RuntimeError, match=r"another protocol; expected .*100.*got .*200"):
        Results(tmp_path / "results.jsonl", {"epochs": 100})


def test_a_given_teacher_is_not_trained(tmp_path):
    torch.manual_seed(5)
    torch.save(ResNet("resnet10-s").state_dict(), tmp_path / "given.pt")
    lane = protocol.Protocol(dry(tmp_path, "--teacher-checkpoint", str(tmp_path / "given.pt")), Until(0))
    assert lane._teacher()
    assert lane.protocol["teacher_epochs"] == "given: given.pt"


def test_differences_are_to_the_better_kd_of_the_same_seeds():
    where = {"device": "CPU", "torch": "2.13", "teacher": 60.0}
    rows = [
        {"student": "resnet10-xxs", "method": name, "seed": seed, "accuracy": accuracy, **where}
        for name, accuracies in {"kd-1": (30.0, 32.0), "kd-2": (33.0, 31.0), "disk-2": (34.0,)}.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    found = report.summary(rows, {}, {}, done=False)["students"]["resnet10-xxs"]
    assert found["disk-2"]["against"] == "kd-2"
    assert found["disk-2"]["minus_kd"] == {"mean": 1.0, "interval_95": None, "values": [1.0]}
    assert found["kd-2"]["minus_kd"] is None
    gap = found["kd-1"]["minus_kd"]
    assert gap["values"] == [-3.0, 1.0]
    half = 12.706 * 2  # t of one degree of freedom, times the standard error: 8 ** .5 / 2 ** .5
    assert gap["interval_95"] == pytest.approx([-1 - half, -1 + half], rel=1e-3)


def test_the_page_shows_the_results_that_are_kept():
    rows = [json.loads(line) for line in (ROOT / "examples/results/gpu/results.jsonl").read_text().splitlines()]
    assert shown("gpu.md", "gpu") == report.table(report.summary(rows, {}, rows[0]["protocol"]))


def test_kd_has_the_temperatures_of_both_forms_of_disk_and_one_more():
    kinds = {REFERENCE: [], "disk": [], "uniform": []}
    for kind, settings in METHODS.values():
        kinds.get(kind, []).append(settings.get("temperature"))
    assert kinds["disk"] == kinds["uniform"] == kinds["kd"][:-1]
    assert kinds["kd"][-1] == 4.0
    assert METHODS["paper"][1] == presets.PAPER["loss"]


def test_packed_images_are_near_the_images_and_leak_into_no_other(tmp_path):
    generator = np.random.default_rng(0)
    splits = {}
    for name, count in (("train", 130), ("test", 20)):
        images = np.repeat(generator.integers(256, size=(count, 1, 1, 3)), 32 * 32, 1).reshape(count, 32, 32, 3)
        splits |= {f"{name}_x": images.astype(np.uint8), f"{name}_y": np.arange(count) % 100}
    np.savez(tmp_path / "plain.npz", **splits)
    packed.write(tmp_path / "plain.npz", tmp_path / "packed.npz", quality=90)
    assert [packed.is_packed(tmp_path / f"{name}.npz") for name in ("plain", "packed")] == [False, True]
    found, kind = packed.read(tmp_path / "packed.npz")
    assert kind == "CIFAR-100 as JPEG of quality 90"
    for split, expected in zip(found, data.load(tmp_path / "plain.npz"), strict=True):
        assert torch.equal(split.labels, expected.labels)
        # of one colour each: whatever differs by more than rounding came from a neighbour
        assert (split.images.int() - expected.images.int()).abs().max() <= 4


def test_on_sigterm_it_stops_after_the_epoch():
    guard, before = Guard(1e9).listen(), signal.getsignal(signal.SIGTERM)
    try:
        assert not guard.over
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        assert guard.over
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert before == guard._tell


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [(["--minutes"], 2, "lacks its value"), (["--fast", "1"], 2, "--fast is unknown"), (["--help"], 0, "Usage: bash")],
)
def test_the_script_says_what_it_does_not_understand(flags, code, said):
    done = subprocess.run(["bash", ROOT / "examples" / "gpu.sh", *flags], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert said in done.stdout
