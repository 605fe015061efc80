"""Two gloo processes with half a batch each, and micro-batches, against one process with the whole batch."""

import contextlib
import copy
import io
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from processes import leave_group
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel

from disk_plugin import DiSKLoss, GuideHead, functional
from disk_plugin.accumulation import AccumulatedBatch
from disk_plugin.distributed import attach, mean_over_processes, share_statistics
from disk_plugin.features import Guided
from disk_plugin.replay import GuideReplay
from disk_plugin.training import GuidedTraining, Recipe
from disk_plugin.uniform import UniformGuide

CLASSES, PROCESSES = 4, 2
HALVES = (torch.float16, torch.bfloat16)
MIXED = 0.8  # nats: one process's half, and one micro-batch, keep to this budget; the others and the whole exceed it

# what two processes do; the same but for these words is what one process does with the whole batch
RUNS = {
    "plain": ({}, {}),
    "clipped": ({"clip": 0.05}, {}),
    "loss scaler": ({"scale": 1024.0}, {}),
    "loss scaler, clipped": ({"scale": 1024.0, "clip": 0.05}, {}),
    "one wide group": ({"grouped": True}, {"grouped": False}),
    "micro-batches": ({"micro": 2}, {}),
    "micro-batches, one average": ({"micro": 2, "no_sync": True}, {"no_sync": False}),
    "slack micro-batches": ({"micro": 2, "budget": 1e3}, {"micro": 1}),
    "violated micro-batches": ({"micro": 2, "budget": 0.0}, {"micro": 1}),
    "exact micro-batches": ({"micro": 2, "exact": True, "no_sync": True}, {"micro": 1, "exact": False}),
}


def make(student_temperature=None, budget=MIXED, **settings):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    guide = GuideHead(CLASSES, hidden_dims=(6,))
    return student, DiSKLoss(guide, budget=budget, student_temperature=student_temperature, **settings).double()


def batch():
    """Sixteen samples, those with the smallest cross-entropy under the fresh student first."""
    generator = torch.Generator().manual_seed(1)
    x = 2 * torch.randn(16, 5, generator=generator, dtype=torch.float64)
    teacher_logits = torch.randn(16, CLASSES, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, (16,), generator=generator)
    order = nn.functional.cross_entropy(make()[0](x), target, reduction="none").argsort()
    return x[order], teacher_logits[order], target[order]


def micro_batches(rank, world, micro):
    """This process's parts; put together, the k-th ones of all processes are the k-th of a single one."""
    index = torch.arange(16).view(PROCESSES, micro, -1).transpose(0, 1).reshape(micro, world, -1)[:, rank]
    return [tuple(value[part] for value in batch()) for part in index]


def shift(disk, by):
    with torch.no_grad():
        for parameter in disk.parameters():
            parameter.add_(by)


def train(
    rank, world, *, micro=1, clip=None, scale=None, no_sync=False, exact=False, grouped=False, steps=2, **settings
):
    """A user's loop; with several processes the student alone is wrapped."""
    student, disk = make(**settings)
    model, shared = student, None
    if world > 1:
        shift(disk, float(rank))  # what another seed would have made of it
        model = DistributedDataParallel(student)
        shared = attach(disk, process_group=dist.new_group([0, 1]) if grouped else None)
    parameters = [*student.parameters(), *disk.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    gradients, norms = [], []
    for _ in range(steps):
        whole = AccumulatedBatch(disk) if exact else None
        optimizer.zero_grad()
        for number, (x, teacher_logits, target) in enumerate(micro_batches(rank, world, micro)):
            with contextlib.ExitStack() as waiting:
                if no_sync and number < micro - 1:
                    waiting.enter_context(model.no_sync())
                    waiting.enter_context(shared.no_sync())
                loss_of = whole.add if exact else disk
                scaler.scale(loss_of(model(x), teacher_logits, target) / micro).backward()
        if exact:
            scaler.scale(whole.terms().guide_loss).backward()
        scaler.unscale_(optimizer)
        norms.append(clip_grad_norm_(parameters, clip or torch.inf))
        gradients.append([parameter.grad.clone() for parameter in parameters])
        scaler.step(optimizer)
        scaler.update()
    return gradients, norms, [parameter.detach() for parameter in parameters]


def overflow(rank):
    """An overflow in one process's guide gradient alone."""
    student, disk = make()
    attach(disk)
    parameters = [*student.parameters(), *disk.parameters()]
    model, optimizer = DistributedDataParallel(student), torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [parameter.detach().clone() for parameter in parameters]
    x, teacher_logits, target = micro_batches(rank, PROCESSES, 1)[0]
    loss = disk(model(x), teacher_logits, target)
    scaler.scale(loss + (torch.inf * disk.guide.mlp[0].bias.sum() if rank else 0.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    moved = [not torch.equal(*pair) for pair in zip(before, parameters, strict=True)]
    return any(moved), scaler.get_scale()


def collectives(rank):
    """How many numbers each all-reduce of the library carries: a step, two halves of one, two micro-batches, eval."""
    sizes, real = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counted
    student, disk = make()
    shared = attach(disk)
    x, teacher_logits, target = micro_batches(rank, PROCESSES, 1)[0]
    counts = {}
    disk(student(x), teacher_logits, target).backward()
    counts["step"], sizes[:] = [*sizes], []
    terms = disk.terms(student(x), teacher_logits, target)
    terms.student_loss.backward(retain_graph=True)
    counts["student"], sizes[:] = [*sizes], []
    terms.guide_loss.backward()
    counts["guide"], sizes[:] = [*sizes], []
    with shared.no_sync():
        disk(student(x), teacher_logits, target).backward()
    counts["no_sync"], sizes[:] = [*sizes], []
    disk.eval()
    with torch.no_grad():
        disk(student(x), teacher_logits, target)
    counts["eval"] = sizes
    dist.all_reduce = real
    return counts


def alone(rank):
    """Gradients of each process by itself: in a group of its own, and after a detach."""
    groups = [dist.new_group([0]), dist.new_group([1])]
    student, disk = make()
    other = copy.deepcopy(disk)
    try:
        attach(other, groups[1 - rank])
    except ValueError as error:
        refused = str(error)
    shared = attach(disk, groups[rank])
    attach(other).detach()
    for loss in (disk, other):
        loss(student(micro_batches(rank, PROCESSES, 1)[0][0]), *micro_batches(rank, PROCESSES, 1)[0][1:]).backward()
    shared.detach()
    return [[parameter.grad for parameter in loss.parameters()] for loss in (disk, other)], refused


def fitted(rank):
    student, disk = make(student_temperature="fit", budget=0.1 + rank)
    attach(disk)
    x, teacher_logits, target = micro_batches(rank, PROCESSES, 1)[0]
    disk(student(x), teacher_logits, target).backward()
    share_statistics(disk)
    buffers = dict(disk.named_buffers())
    return {name: buffers[name] for name in sorted(buffers)}


def replayed(rank):
    """The temperature fitted where no backward reaches the guide."""
    student, disk = make(student_temperature="fit")
    replay = GuideReplay(disk, torch.optim.SGD(disk.guide.parameters(), lr=0.1))
    x, teacher_logits, target = micro_batches(rank, PROCESSES, 1)[0]
    replay.student_loss(student(x), teacher_logits, target).backward()
    return disk.fitted_student_temperature


def fitted_without_parameters(rank):
    """Temperatures fitted beside guides that no gradient reaches: one without parameters, a frozen one."""
    seen = []
    for guide in (UniformGuide(0.1), GuideHead(CLASSES).requires_grad_(False)):
        disk = DiSKLoss(guide, student_temperature="fit").double()
        attach(disk)
        student, _ = make()
        for x, teacher_logits, target in micro_batches(rank, PROCESSES, 2):
            disk(student(x), teacher_logits, target).backward()
        seen.append(disk.fitted_student_temperature)
    return seen


def in_half_precision(rank):
    """Means of values whose sum float16 cannot hold, and of a half guide's gradients."""
    means = [mean_over_processes(torch.tensor([6e4, rank], dtype=dtype)) for dtype in HALVES]
    gradients = []
    for dtype in HALVES:
        student, disk = make()
        disk.to(dtype)
        attach(disk)
        disk(student(micro_batches(rank, PROCESSES, 1)[0][0]), *micro_batches(rank, PROCESSES, 1)[0][1:]).backward()
        gradients.append([parameter.grad for parameter in disk.parameters()])
    return means, gradients


def algorithm_1(rank, world=PROCESSES):
    """Two outer iterations on the training core; each process begins with a guide of its own."""
    student, disk = make()
    shift(disk, 0.1 * rank)
    wrapped = DistributedDataParallel(student) if world > 1 else student
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    own = {"recipe": Recipe(guide_passes=2, student_passes=1)}
    own["guide_optimizer"] = torch.optim.SGD(disk.guide.parameters(), lr=0.1)
    training = GuidedTraining(Guided(disk), epochs=2, dual={"multiplier": (5.0, 5.0)}, **own)
    training.share_between_processes()
    loader, logs = micro_batches(rank, world, 1), []
    for epoch in range(2):
        training.begin_epoch(epoch)
        training.run_guide_passes(loader, lambda given: (student(given[0]), given[1], given[2]))
        for x, teacher_logits, target in loader:
            optimizer.zero_grad()
            training.loss(wrapped(x), teacher_logits, target).backward()
            optimizer.step()
        logs.append(training.end_epoch())
    return [value.detach() for value in (*disk.guide.parameters(), *student.parameters())], logs


def process(rank, folder):
    torch.set_num_threads(1)
    address, patience = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=PROCESSES, timeout=patience)
    seen = {name: train(rank, PROCESSES, **words) for name, (words, _) in RUNS.items()}
    seen |= {
        check.__name__: check(rank)
        for check in (
            *(overflow, collectives, alone, fitted, fitted_without_parameters, replayed, in_half_precision),
            algorithm_1,
        )
    }
    torch.save(seen, f"{folder}/{rank}")
    leave_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each process saw; one launch for all tests."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(process, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(PROCESSES)]


@pytest.fixture
def single():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def usage(student, disk, rows=slice(None)):
    x, teacher_logits, target = batch()
    return functional.usage(student(x)[rows].detach(), target[rows], disk.guide_logits(teacher_logits)[rows])


def guide_gradient(disk, loss):
    return list(torch.autograd.grad(loss, [*disk.parameters()]))


def test_the_budget_is_kept_by_one_half_and_exceeded_by_the_other():
    """What the runs below rest on: between processes and between micro-batches the hinges of parts disagree."""
    student, disk = make()
    first, second = slice(8), slice(8, 16)
    assert usage(student, disk, first) < 0.97 * MIXED < 1.03 * MIXED < usage(student, disk, second)
    early, late = torch.arange(16).view(PROCESSES, 2, 4).unbind(1)
    assert usage(student, disk, early.flatten()) < 0.97 * MIXED < 1.03 * MIXED < usage(student, disk, late.flatten())
    assert usage(student, disk) > 1.03 * MIXED


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_with_the_whole_batch(both, name):
    words, changed = RUNS[name]
    expected = train(0, 1, **{**words, **changed})
    for seen in both:
        torch.testing.assert_close(seen[name], expected, rtol=1e-10, atol=1e-13)
    # bit for bit, or the guides drift apart
    torch.testing.assert_close(both[0][name], both[1][name], rtol=0, atol=0)


def test_algorithm_1_in_two_processes_is_that_of_one_with_the_whole_batch(both):
    expected, log = algorithm_1(0, 1)
    for found, logged in (seen["algorithm_1"] for seen in both):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
        assert logged == both[0]["algorithm_1"][1]
        assert logged[-1]["usage"] == pytest.approx(log[-1]["usage"])
    torch.testing.assert_close(both[0]["algorithm_1"][0], both[1]["algorithm_1"][0], rtol=0, atol=0)
    assert not torch.equal(expected[0], next(make()[1].guide.parameters()))


def test_half_values_are_averaged_without_overflow(both):
    for dtype, mean in zip(HALVES, both[0]["in_half_precision"][0], strict=True):
        assert torch.equal(mean, torch.tensor([6e4, 0.5], dtype=dtype))
    torch.testing.assert_close(both[0]["in_half_precision"], both[1]["in_half_precision"], rtol=0, atol=0)
    for dtype, gradients in zip(HALVES, both[0]["in_half_precision"][1], strict=True):
        student, disk = make()
        expected = guide_gradient(disk.to(dtype), disk(student(batch()[0]), *batch()[1:]))
        torch.testing.assert_close(gradients, expected, rtol=0.05, atol=0.01)


def test_an_overflow_on_one_process_skips_the_step_on_all(both):
    assert [seen["overflow"] for seen in both] == [(False, 4.0)] * 2


def test_there_is_one_average_of_a_number_per_evaluation_and_one_of_the_gradients_per_backward(both):
    numbers = sum(parameter.numel() for parameter in make()[1].parameters())
    # the two halves share an evaluation, whose scalar the student's line shows
    expected = {"step": [1, numbers], "student": [1], "guide": [numbers], "no_sync": [1], "eval": []}
    assert [seen["collectives"] for seen in both] == [expected] * 2


def test_a_process_in_its_own_group_or_detached_has_its_own_gradient(both):
    for rank, seen in enumerate(both):
        student, disk = make()
        x, teacher_logits, target = micro_batches(rank, PROCESSES, 1)[0]
        expected = guide_gradient(disk, disk(student(x), teacher_logits, target))
        for gradient in seen["alone"][0]:
            torch.testing.assert_close(gradient, expected)
        assert seen["alone"][1] == f"process_group must hold this process, global rank {rank}, got one without it"


def test_budget_fitted_temperature_and_statistics_become_the_same(both):
    torch.testing.assert_close(both[0]["fitted"], both[1]["fitted"], rtol=0, atol=0)
    assert both[0]["fitted"]["budget"] == 0.1
    assert both[0]["fitted"]["epoch_statistics"][1] == 16
    # from the same start, each process's step on its half, averaged
    student, disk = make(student_temperature="fit")
    steps = []
    for x, teacher_logits, target in (micro_batches(rank, PROCESSES, 1)[0] for rank in range(PROCESSES)):
        own = copy.deepcopy(disk)
        own(student(x), teacher_logits, target)
        steps.append(own.fitted_student_temperature)
    assert steps[0] != steps[1]
    torch.testing.assert_close(both[0]["fitted"]["fitted_student_temperature"], sum(steps) / 2)
    for seen in both:
        torch.testing.assert_close(seen["replayed"], sum(steps) / 2)


def test_a_temperature_is_shared_where_no_gradient_reaches_the_guide(both):
    ours, theirs = (seen["fitted_without_parameters"] for seen in both)
    assert len(ours) == 2
    assert ours == theirs
    assert all(temperature != 2.0 for temperature in ours)


def test_the_difference_of_micro_batches_is_the_documented_one_and_the_exact_mode_has_none():
    student, disk = make(guide_gradient_scale=None)
    x, teacher_logits, target = batch()
    full = guide_gradient(disk, disk(student(x), teacher_logits, target))
    halves, difference = [], [torch.zeros_like(gradient) for gradient in full]
    for half in (slice(8), slice(8, 16)):
        halves.append(guide_gradient(disk, disk(student(x[half]), teacher_logits[half], target[half])))
        spent = usage(student, disk, half)
        weight = disk.multiplier / 2 * ((spent > MIXED).double() - 1.0)  # the whole exceeds the budget
        difference = [d + weight * s for d, s in zip(difference, guide_gradient(disk, spent), strict=True)]
    mean = [sum(pair) / 2 for pair in zip(*halves, strict=True)]
    torch.testing.assert_close([m - f for m, f in zip(mean, full, strict=True)], difference)
    assert max(d.abs().max() for d in difference) > 0.01


@pytest.mark.parametrize("variant", ["paper", "official_cifar"])
def test_an_accumulated_batch_gives_what_the_batch_gives(variant):
    """Labels ignored, samples weighted, micro-batches of different sizes: every value, and the statistics."""
    student, disk = make(variant=variant)
    x, teacher_logits, target = batch()
    target[3], weight = -100, torch.rand(16, dtype=torch.float64)
    expected = disk.terms(student(x), teacher_logits, target, sample_weight=weight)
    gradient, counted = guide_gradient(disk, expected.guide_loss), disk.statistics()
    disk.reset_statistics()
    whole, halves = AccumulatedBatch(disk), []
    for part in (slice(6), slice(6, 16)):
        arguments = student(x[part]), teacher_logits[part], target[part]
        halves.append(whole.add(*arguments, sample_weight=weight[part]))
    loss_of_each = torch.autograd.grad(
        (5 * halves[0] + 10 * halves[1]) / 15, [*student.parameters()]
    )  # one of the first six is ignored
    terms = whole.terms()
    torch.testing.assert_close(terms._asdict(), expected._asdict())
    torch.testing.assert_close(guide_gradient(disk, terms.guide_loss), gradient)
    torch.testing.assert_close(
        list(loss_of_each), list(torch.autograd.grad(expected.student_loss, [*student.parameters()]))
    )
    assert disk.statistics() == pytest.approx(counted)
    assert disk.training


def test_an_accumulated_batch_refuses_what_it_cannot_do():
    with pytest.raises(TypeError, match=r"disk must be a DiSKLoss \(not a wrapper around it\), got Linear"):
        AccumulatedBatch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="student_feels_budget must be False, got True"):
        AccumulatedBatch(make(variant="official_imagenet")[1])
    whole = AccumulatedBatch(make()[1])
    with pytest.raises(RuntimeError, match=r"at least one micro-batch, got none: call add\(...\) before"):
        whole.terms()
    arguments = torch.randn(2, CLASSES), torch.randn(2, CLASSES), torch.zeros(2, dtype=torch.int64)
    whole.add(*arguments)
    with pytest.raises(ValueError, match=r"as the first did, got \[.*'sample_weight'\]"):
        whole.add(*arguments, sample_weight=torch.ones(2))
    longer = torch.randn(2, CLASSES, 7), torch.randn(2, CLASSES, 7), torch.zeros(2, 7, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"student_logits of every .* first's shape \(N, 4\), got \(2, 4, 7\): pad"):
        whole.add(*longer)
    assert whole.terms().counted == 2  # what was refused is not kept


def test_attach_says_what_is_missing(single):
    disk = make()[1]
    with pytest.raises(TypeError, match="disk must be a DiSKLoss or a Guided, got Linear"):
        attach(nn.Linear(2, 2))
    attach(disk)
    with pytest.raises(RuntimeError, match=r"reduce_mean must be None, got .* is the loss attached already"):
        attach(disk)
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match=r"needs a process group, got none: call torch.distributed.init_process"):
        attach(make()[1])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_a_copy_of_an_attached_loss_is_not_attached(single):
    disk = make()[1]
    attach(disk)
    file = io.BytesIO()
    torch.save(disk, file)
    file.seek(0)
    for each in (copy.deepcopy(disk), torch.load(file, weights_only=False)):
        assert each.reduce_mean is None
        attach(each).detach()
    assert disk.reduce_mean is not None


def test_a_loss_inside_ddp_is_refused_until_the_wrapper_is_gone(single):
    student, disk = make()
    DistributedDataParallel(student)
    message = "a loss outside DistributedDataParallel, got one inside "
    wrapper = DistributedDataParallel(nn.ModuleDict({"student": student, "disk": disk}))
    with pytest.raises(RuntimeError, match=message + r"\(it wraps a ModuleDict\)"):
        attach(disk)
    del wrapper
    wrapper = DistributedDataParallel(make()[1])
    for form in (wrapper, wrapper.module):
        with pytest.raises(RuntimeError, match=message + r"\(it wraps a DiSKLoss\).*wrap the student alone"):
            attach(form)
    attach(disk)


def test_a_loss_that_is_wrapped_after_attach_is_refused_in_its_first_backward(single):
    student, disk = make()
    attach(disk)
    wrapper = DistributedDataParallel(disk)
    x, teacher_logits, target = batch()
    loss = wrapper(student(x), teacher_logits, target)
    with pytest.raises(RuntimeError, match=r"got one inside \(it wraps a DiSKLoss\)"):
        loss.backward()


def test_a_failed_backward_does_not_end_the_averages(single, monkeypatch):
    student, disk = make()
    attach(disk)
    averaged = []
    for module in ("distributed", "_collectives"):  # the usage's mean, and the gradients'
        monkeypatch.setattr(f"disk_plugin.{module}.mean_over_processes", lambda value, _: averaged.append(1) or value)
    x, teacher_logits, target = batch()
    fails = student[0].bias.register_hook(lambda gradient: {}["the student's half comes after the guide's"])
    with pytest.raises(KeyError):
        disk(student(x), teacher_logits, target).backward()
    assert next(disk.parameters()).grad is not None
    assert len(averaged) == 1  # the usage
    fails.remove()
    disk(student(x), teacher_logits, target).backward()
    assert len(averaged) == 3


@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_moving_average_of_an_attached_loss_covers_the_guide(single, use_buffers):
    student, disk = make()
    attach(disk)
    average = AveragedModel(disk, use_buffers=use_buffers)
    first, *_ = (parameter.detach().clone() for parameter in disk.parameters())
    average.update_parameters(disk)
    shift(disk, 1.0)
    x, teacher_logits, target = batch()
    disk(student(x), teacher_logits, target)
    average.update_parameters(disk)
    torch.testing.assert_close(next(average.parameters()), first + 0.5)
    assert average.module.eval()(student(x), teacher_logits, target).isfinite()


def test_the_example_runs_under_torchrun():
    script = Path(__file__).parents[1] / "examples" / "torchrun.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run([*launcher, str(script), "--dry-run"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = ended.stdout.splitlines()[-1]  # gloo of torch 2.9 prints too
    assert found.startswith("2 processes: validation accuracy ")
    assert found.endswith("; the guides differ by 0")
