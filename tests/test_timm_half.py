"""timm's tasks under autocast, through whole epochs: joint, alternating, with replay, with SimKD."""

import copy

import pytest
import torch

timm = pytest.importorskip("timm")

from test_timm_task import batch, make  # noqa: E402

from disk_plugin.integrations.timm import DiSKSimKDTask, DiSKTask  # noqa: E402

# a few steps of a guide on random images tell nothing about its health
pytestmark = pytest.mark.filterwarnings("ignore:the guide", "ignore:in the .* epochs")

GENTLE = {"student_passes": 1, "guide_lr": 0.01}
ALTERNATING = {"mode": "alternating", "alternating": {**GENTLE, "guide_passes": 1}}
REPLAY = {"mode": "alternating", "alternating": {**GENTLE, "guide_passes": 2, "replay": True}}


def run(kind, settings, dtype, epochs=3):
    """Train as the host does, two micro-batches a step; return the task and what each epoch logged."""
    task = make(kind, "test_vit2", epochs=epochs, dual={"multiplier": (5.0, 5.0)}, **settings)
    # small steps: on random images large ones take the smallest difference anywhere
    optimizer, logged = torch.optim.SGD(task.get_trainable_module().parameters(), lr=1e-3), []

    def autocast():
        return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

    for epoch in range(epochs):
        task.begin_epoch(epoch)
        loader = [batch(seed=10 * epoch + index) for index in range(4)]
        task.run_guide_passes(loader, autocast=autocast)
        task.get_trainable_module().train()
        for index, (image, target) in enumerate(loader):
            with autocast():
                loss = task(image, target)["loss"]
            loss /= 2
            loss.backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
        logged.append(task.end_epoch())
    return task, logged


@pytest.mark.parametrize("kind", [DiSKTask, DiSKSimKDTask])
@pytest.mark.parametrize("settings", [{}, ALTERNATING, REPLAY], ids=["joint", "alternating", "replay"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_epochs_under_autocast_go_as_those_in_float32(kind, settings, dtype):
    before = copy.deepcopy(make(kind, "test_vit2", **settings).disk.guide.state_dict())
    (_, exact), (task, logged) = run(kind, settings, torch.float32), run(kind, settings, dtype)
    guide = task.disk.guide.state_dict()
    assert all(value.isfinite().all() for value in guide.values())
    assert any(not torch.equal(value, before[name]) for name, value in guide.items())
    assert {value.dtype for value in guide.values()} == {torch.float32}
    for full, half in zip(exact, logged, strict=True):
        for name in ("logged_loss", "ce", "distill", "divergence", "usage", "task_loss"):
            assert half[name] == pytest.approx(full[name], rel=0.01, abs=0.01), name
        assert half["teacher_top1"] == pytest.approx(full["teacher_top1"], abs=100 / 32 + 1e-6)  # one image of 32
