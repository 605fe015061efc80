"""What a device adds to training: half precision, compilers, replay, the cache, graphs, memory, waiting."""

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
from gpu_lane import graphs
from torch import nn
from torch.utils.data import TensorDataset
from twins import C, D, N, assert_close, batch, evaluated, moved, twins

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, functional
from disk_plugin.cache import SeededViews, TeacherCache
from disk_plugin.replay import GuideReplay
from disk_plugin.uniform import UniformGuide

LARGEST = (4096, 32000)
GUIDES = {"trained": lambda: GuideHead(C, D), "uniform": lambda: UniformGuide(discount=0.4)}
every_guide = pytest.mark.parametrize("make_guide", GUIDES.values(), ids=GUIDES)


def make_loss(make_guide=GUIDES["trained"], **settings):
    return DiSKLoss(make_guide(), **{"multiplier": 7.0, "budget": 0.05, **settings})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_the_loss_is_that_of_the_rounded_logits(device, dtype):
    expected, found = twins(make_loss, device)
    rounded = [value.to(dtype) if value.is_floating_point() else value for value in batch()]
    with torch.autocast(device, dtype):
        terms, gradients = evaluated(found.terms, *(value.to(device) for value in rounded))
    reference, slopes = evaluated(expected.terms, *moved(rounded, "cpu", torch.double))
    assert all(value.dtype == torch.float32 for value in terms)
    assert_close(terms, reference, 1e-4)
    assert_close(gradients, slopes, torch.finfo(dtype).eps)


def scaled_step(student, disk, scaler, values, dtype):
    """A step of training under a GradScaler; returns the loss."""
    optimizer = torch.optim.SGD([*student.parameters(), *disk.parameters()], lr=0.1)
    _, teacher, target, features = values
    with torch.autocast(features.device.type, dtype):
        loss = disk(student(features), teacher, target, features)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


def test_a_step_under_a_grad_scaler_is_the_cpus_step(device):
    expected, found = twins(lambda: nn.ModuleList([nn.Linear(D, C), make_loss()]), device)
    before = [parameter.detach().cpu().clone() for parameter in found.parameters()]
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    _, teacher, target, features = batch()
    expected[1](expected[0](features), teacher, target, features).backward()
    optimizer.step()
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
    scaled_step(*found, scaler, moved(batch(), device), torch.float16)
    steps = [
        [now.detach().cpu() - old for now, old in zip(each.parameters(), before, strict=True)]
        for each in (found, expected)
    ]
    for one, other in zip(*steps, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=0.02 * other.abs().max().item() + 1e-6)


def test_an_overflow_is_skipped_and_seen(device):
    _, modules = twins(lambda: nn.ModuleList([nn.Linear(D, C), make_loss()]), device)
    before = [parameter.detach().clone() for parameter in modules.parameters()]
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
    values = moved(batch(), device)
    values[3] = values[3] * torch.finfo(torch.float32).max  # what the guide and the student read
    loss = scaled_step(*modules, scaler, values, torch.float16)
    assert not loss.isfinite()
    assert scaler.get_scale() == 2.0**7
    assert all(torch.equal(now, old) for now, old in zip(modules.parameters(), before, strict=True))
    assert modules[1].epoch_batches.tolist() == [1.0, 1.0]
    assert modules[1].statistics().positions == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch 2.13's own
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "gcc")) is None, reason="no C compiler: gcc, or what CC names")
@every_guide
def test_a_compiled_loss_is_the_cpus(device, make_guide):
    if device == "cpu" and make_guide is not GUIDES["trained"]:
        pytest.skip("on the CPU one is enough, tests/test_compiled.py has the others")
    torch.compiler.reset()
    expected, found = twins(lambda: make_loss(make_guide), device)
    # Triton where there is CUDA; what inductor writes for a CPU has tests of its own, here it is traced alone
    compiled = torch.compile(found.terms, fullgraph=True, backend="inductor" if device == "cuda" else "eager")
    for seed in range(2):
        both = [
            evaluated(terms_of, *values, parameters=list(disk.parameters()))
            for disk, terms_of, values in (
                (expected, expected.terms, batch(seed)),
                (found, compiled, moved(batch(seed), device)),
            )
        ]
        for one, other in zip(both[1], both[0], strict=True):
            assert_close(one, other, 1e-4)
    assert_close(found.guide.buffers(), expected.guide.buffers(), 1e-4)


@pytest.mark.parametrize("shape", [(1024, 1000), (64, 4099)])
def test_triton_kernels_over_many_classes_are_the_cpus(cuda, shape):
    torch.compiler.reset()
    compiled = torch.compile(functional.disk_terms, fullgraph=True, dynamic=False)
    student, teacher = (3 * torch.randn(shape, dtype=torch.double) for _ in range(2))
    inputs = student, teacher, torch.randint(shape[1], shape[:1]), torch.randn(shape[0], dtype=torch.double)
    for found, expected in zip(
        evaluated(compiled, *moved(inputs, cuda)), evaluated(functional.disk_terms, *inputs), strict=True
    ):
        assert_close(found, expected)


def test_the_replays_guide_passes_are_the_cpus(device):
    expected, found = twins(make_loss, device)
    losses = []
    for disk, where, dtype in ((expected, "cpu", torch.double), (found, device, torch.float32)):
        optimizer = torch.optim.SGD(disk.guide.parameters(), lr=0.1, momentum=0.9)
        replay = GuideReplay(disk, optimizer, batch_size=16, dtype=dtype, seed=3)
        for seed in range(3):
            replay.student_loss(*moved(batch(seed), where, dtype))
        assert len(replay) == 3 * (N - 1)
        losses.append(replay.train_guide(passes=3))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert_close(found.parameters(), expected.parameters(), 1e-4)


@pytest.mark.parametrize("mode", ["features", "logits", "logits+features"])
def test_the_cache_holds_what_the_teacher_says_on_its_device(device, mode, tmp_path):
    plain, teacher = twins(lambda: nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, C)).eval(), device)
    images = torch.randn(12, D)
    views = SeededViews(TensorDataset(images, torch.arange(12)), 2)
    cache = TeacherCache.write(tmp_path, teacher, views, mode=mode, device=device, batch_size=5, progress=False)
    index = torch.randperm(12)
    logits, features = cache(index, 1)
    half = {"features": 2e-3, "logits": 1e-3, "logits+features": 1e-3}[mode]
    assert_close([logits], [plain(images.double())[index]], half)
    if mode != "logits":
        assert_close([features], [plain[:2](images.double())[index]], 1e-3)
    assert TeacherCache(tmp_path).verify(teacher, views, share=1.0, device=device) < 0.01


def test_a_state_saved_on_a_device_loads_on_the_cpu_and_back(device, tmp_path):
    _, disk = twins(make_loss, device)
    disk(*moved(batch(), device))
    torch.save(disk.state_dict(), tmp_path / "disk.pt")
    fresh = make_loss()
    fresh.load_state_dict(torch.load(tmp_path / "disk.pt", map_location="cpu", weights_only=True))
    back = copy.deepcopy(fresh).to(device)
    for one, other in zip(back.state_dict().values(), disk.state_dict().values(), strict=True):
        assert torch.equal(one, other)
        assert one.device == other.device


@every_guide
def test_a_step_waits_for_nothing(cuda, make_guide):
    _, disk = twins(lambda: make_loss(make_guide), cuda)
    values = moved(batch(), cuda)
    for _ in range(2):
        evaluated(disk.terms, *values, parameters=list(disk.parameters()))
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluated(disk.terms, *values, parameters=list(disk.parameters()))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_guide
def test_a_graph_of_a_step_goes_on_as_steps_do(cuda, make_guide):
    _, disk = twins(lambda: make_loss(make_guide), cuda)
    twin = copy.deepcopy(disk)
    student, *others = moved(batch(), cuda)
    student.requires_grad_()

    def step(loss):
        value = loss(student, *others)
        return [value.detach(), *torch.autograd.grad(value, [student, *loss.parameters()])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    before = copy.deepcopy(disk.state_dict())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(disk)
    torch.cuda.current_stream().wait_stream(side)
    disk.load_state_dict(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(disk)
    for _ in range(4):
        graph.replay()
        expected = step(twin)
    assert_close(found, [value.cpu() for value in expected], 1e-5)
    assert_close([disk.epoch_statistics], [twin.epoch_statistics.cpu()], 1e-6)
    assert_close(disk.guide.buffers(), [value.cpu() for value in twin.guide.buffers()], 1e-6)


@every_guide
@pytest.mark.parametrize("shape", [(), (2,)])
def test_the_lane_records_a_step_as_parallel_branches(cuda, make_guide, shape):
    """Parameters of a loss among the state, in the form that README's loop has; losses of one method or of several."""
    disk = DiSKLoss(make_guide()).to(cuda)
    student, *others = moved(batch(), cuda)
    student.requires_grad_()
    state, losses, stream = [*disk.parameters(), *disk.buffers()], torch.zeros(shape, device=cuda), torch.cuda.Stream()

    def step(parallel):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = disk(student, *others)
            gradients = torch.autograd.grad(loss, [student, *disk.parameters()])[1:]
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for parameter, gradient in zip(disk.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
        losses.add_(loss.detach())

    before = [tensor.clone() for tensor in disk.state_dict().values()]
    make, how = graphs.recorded(step, [*state, losses], losses)
    assert how == graphs.BRANCHES
    assert all(torch.equal(*pair) for pair in zip(disk.state_dict().values(), before, strict=True))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    make()
    torch.cuda.synchronize()
    assert losses.abs().min() > 0


UNRECORDABLE = """
import torch
from gpu_lane import graphs

losses = torch.zeros((), device="cuda")
make, how = graphs.recorded(lambda parallel: losses.add_(losses.item() + 1), [losses], losses)  # waits for the device
make()
print(how, losses.item(), torch.cuda.current_stream() == torch.cuda.default_stream())
"""


def test_a_step_that_cannot_be_recorded_is_made_as_it_is(cuda):
    # in a process of its own: torch may not draw random numbers on the device after a recording that failed
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", UNRECORDABLE], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [graphs.EAGER, "1.0", "True"]
    assert "no CUDA graph of a step" in found.stderr


def test_a_scheduler_drives_the_buffers_that_a_graph_reads(cuda):
    _, disk = twins(make_loss, cuda)
    addresses = [buffer.data_ptr() for buffer in disk.buffers()]
    dual = DualScheduler(disk, epochs=8)
    for epoch in range(4):
        disk(*moved(batch(epoch), cuda))
        dual.step()
    assert [buffer.data_ptr() for buffer in disk.buffers()] == addresses


def peak(function):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - held


def test_values_and_peak_memory_at_the_largest_shape(cuda):
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    count, classes = LARGEST
    student, teacher = (torch.randn(LARGEST, device=cuda).mul_(3) for _ in range(2))
    target, guide = torch.randint(classes, (count,), device=cuda), torch.randn(count, device=cuda)
    student.requires_grad_()
    guide.requires_grad_()

    def disk():
        return torch.autograd.grad(functional.disk_loss(student, teacher, target, guide), [student, guide])

    def kl():
        log_s, t = (student / 4).log_softmax(1), (teacher / 4).softmax(1)
        return torch.autograd.grad(16 * nn.functional.kl_div(log_s, t, reduction="batchmean"), student)

    assert peak(disk) <= peak(kl)
    found, rows = disk(), slice(0, 64)  # a mean over samples: rows are apart but for its denominator and the hinge
    terms = functional.disk_terms(student, teacher, target, guide, reduction="none")
    inputs = [value[rows].detach() for value in (student, teacher, target, guide)]
    expected = functional.disk_terms(*moved(inputs, "cpu", torch.double), reduction="none")
    assert_close([value[rows] for value in terms], expected)
    small = [value.requires_grad_(value.is_floating_point()) for value in moved(inputs, "cpu", torch.double)]
    (slope,) = torch.autograd.grad(functional.disk_terms(*small).student_loss, small[0])
    torch.testing.assert_close(found[0][rows].cpu().double() * count, slope * 64, rtol=1e-3, atol=1e-6)
