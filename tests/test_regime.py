"""The map's machinery: stacked students train as single ones do, the rule's arithmetic, resuming, what is drawn."""

import argparse
import json
from pathlib import Path

import pytest
import regime_map
import torch
from evidence import shown
from regime import cells, problems, report, rule
from regime.arms import ARMS, Arm, Guided, kd
from regime.rule import Point, Rule
from regime.stacked import Batch, Stack, batches, cross_entropy, fit
from torch import nn

from disk_plugin import DiSKLoss, DualScheduler, GuideHead, functional

EXAMPLES = Path(regime_map.__file__).parent
SEEDS, PASSES = (3, 4), 4


@pytest.fixture
def data():
    """Two seeds with 40 samples each: four inputs, three classes, five features of the teacher."""
    return Batch(torch.randn(2, 40, 4), torch.randint(3, (2, 40)), 2 * torch.randn(2, 40, 3), torch.randn(2, 40, 5))


def alone(stack, setting, seed):
    """Return one network of the stack as a module."""
    layers = []
    for weight, bias in zip(stack.weights, stack.biases, strict=True):
        linear = nn.Linear(*weight.shape[2:])
        linear.weight.data.copy_(weight[setting, seed].T)
        linear.bias.data.copy_(bias[setting, seed, 0])
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train_alone(model, loss_of, data, seed, parameters=(), after_pass=lambda: None):
    optimizer = torch.optim.SGD([*model.parameters(), *parameters], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PASSES)
    for pieces in batches(data, 10, SEEDS, PASSES):
        for batch in pieces:
            optimizer.zero_grad()
            loss_of(model(batch.x[seed]), *(part[seed] for part in batch[1:])).backward()
            optimizer.step()
        scheduler.step()
        after_pass()


def same(stack, setting, seed, model):
    expected = alone(stack, setting, seed)
    for mine, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_stacked_network_trains_as_another_than_alone(data):
    """Cross-entropy, then two settings of KD from its end."""
    stack = Stack.fresh((4, 6, 3), SEEDS, torch.relu)
    models = [alone(stack, 0, seed) for seed in range(2)]
    options = {"passes": PASSES, "batch_size": 10, "seeds": SEEDS}
    fit(stack.parameters, lambda batch: cross_entropy(stack, batch), data, **options)
    for seed, model in enumerate(models):
        train_alone(model, lambda logits, y, *_: nn.functional.cross_entropy(logits, y), data, seed)
        same(stack, 0, seed, model)
    copies = stack.copies(2)
    settings = [{"temperature": t, "ce_weight": 0.1, "distill_weight": 0.9} for t in (1.0, 4.0)]

    def loss_of(batch):
        logits = copies(batch.x)[0]
        return sum(kd(logits[k], batch, each) for k, each in enumerate(settings))

    fit(copies.parameters, loss_of, data, **options)
    for k, each in enumerate(settings):
        for seed in range(2):
            model = alone(stack, 0, seed)
            train_alone(model, lambda logits, y, t, _, s=each: functional.kd_loss(logits, t, y, **s), data, seed)
            same(copies, k, seed, model)


def test_a_stacked_uniform_guide_moves_otherwise_than_alone(data):
    """Two widths and two seeds: each of the four has a g of its own, and hears of its progress."""
    stacks = [Stack.fresh((4, width, 3), SEEDS, torch.relu) for width in (5, 6)]
    arm = ARMS["uniform"]
    guided = Guided(arm, 2.0, students=4, sizes=(3, 5), passes=PASSES)
    models = [alone(stack, 0, seed) for stack in stacks for seed in range(2)]
    fit(
        [value for stack in stacks for value in stack.parameters],
        lambda batch: guided(torch.cat([stack(batch.x)[0][0] for stack in stacks]), batch),
        data,
        passes=PASSES,
        batch_size=10,
        seeds=SEEDS,
        after_pass=guided.step,
    )
    for i, model in enumerate(models):
        disk = DiSKLoss(arm.guide(3, 5), temperature=2.0, **arm.loss)
        dual = DualScheduler(disk, epochs=PASSES)
        train_alone(model, lambda s, y, t, _, disk=disk: disk(s, t, y), data, i % 2, after_pass=dual.step)
        same(stacks[i // 2], 0, i % 2, model)
        torch.testing.assert_close(guided.stacked.buffers["guide.log_guide"][i], disk.guide.log_guide)
        assert guided.stacked.buffers["guide.progress"][i] == 1
    assert len(guided.stacked.buffers["guide.log_guide"].unique()) == 4


def test_a_stacked_guide_network_learns_otherwise_than_alone(data):
    arm = Arm(GuideHead, {"ce_weight": 0.0, "distill_weight": 1.0}, reads_features=True)
    stack = Stack.fresh((4, 6, 3), SEEDS, torch.relu)
    guided = Guided(arm, 2.0, students=2, sizes=(3, 5), passes=PASSES)
    models = [alone(stack, 0, seed) for seed in range(2)]
    disks = [DiSKLoss(GuideHead(3, 5), temperature=2.0, **arm.loss) for _ in range(2)]
    for i, disk in enumerate(disks):
        for name, value in disk.named_parameters():
            value.data.copy_(guided.stacked.parameters[name][i])
    fit(
        [*stack.parameters, *guided.parameters],
        lambda batch: guided(stack(batch.x)[0][0], batch),
        data,
        passes=PASSES,
        batch_size=10,
        seeds=SEEDS,
        after_pass=guided.step,
    )
    for i, disk in enumerate(disks):
        dual = DualScheduler(disk, epochs=PASSES)
        train_alone(
            models[i],
            lambda s, y, t, f, disk=disk: disk(s, t, y, f),
            data,
            i,
            disk.parameters(),
            dual.step,
        )
        same(stack, 0, i, models[i])
        for name, value in disk.named_parameters():
            torch.testing.assert_close(guided.stacked.parameters[name][i], value, rtol=1e-3, atol=1e-5)


def tiny(seeds=(0, 1)):
    return problems.synthetic(10, 3, 200, seeds, dry_run=True)


def test_the_setting_is_chosen_on_other_than_validation_data():
    """Test labels that nobody can get right: the choice, and so the settings, stay."""
    problem = tiny()
    broken = problem._replace(test=problem.test._replace(y=torch.full_like(problem.test.y, -1)))
    found, other = (cells.cells(each, (4,))[0]["methods"] for each in (problem, broken))
    for method in ("KD", *ARMS):
        assert found[method]["settings"] == other[method]["settings"]
        assert found[method]["validation"] == other[method]["validation"]
        assert other[method]["test"] == [0.0, 0.0]
        assert max(found[method]["test"]) > 0
    assert len(found["KD"]["validation"]) == 6


def test_a_width_changes_with_its_neighbours():
    (both,) = (cell for cell in cells.cells(tiny(), (4, 8)) if cell["width"] == 8)
    (single,) = cells.cells(tiny(), (8,))
    for name in ("teacher_train", "student_train", "student_held_out", "agreement"):
        assert both[name] == single[name]
    assert both["methods"] == single["methods"]


def point(capacity, data, gain, problem="a", synthetic=True):
    return Point(problem, problem, synthetic, capacity, data, gain, 0.1)


def test_other_thresholds_are_derived():
    gains = [point(42, 3, 3.0), point(63, 8, 2.0), point(80, 12, 1.0, "b"), point(90, 18, -3.0, "b")]
    none = [point(3, 1, 0.0, "c"), point(12, 12, -0.8, "c"), point(2, 38, -0.1, "c"), point(16, 4, 0.3, "c")]
    real = [point(1, 1, 50.0, "real", synthetic=False)]
    # worth 2.5 + 1.5 + .5 with a gap by data of at most 15; 5 to 15 of capacity would take losses or gains too small
    assert rule.derive([*gains, *none, *real]) == Rule(25, 10)  # of 15 to 40 the middle; 10 misses .5 alone
    found = rule.score([*gains, *none], map(Rule(25, 10), [*gains, *none]))
    assert found == (5, 4, 1, 0, 2.5, 2)
    assert rule.left_out([*gains, *none]).clear == 5


def test_a_cell_is_placed_elsewhere():
    cell = {"problem": "10 classes x 3 clusters", "width": 4, "teacher_train": [100.0, 98.0]}
    cell |= {"student_train": [60.0, 50.0], "student_held_out": [55.0, 45.0]}
    cell["methods"] = {"KD": {"test": [50.0, 40.0]}, "DiSK": {"test": [52.0, 46.0]}}
    (found,) = rule.points({"problems": {"key": {"cells": [cell]}}})
    assert found == ("key, width 4", "key", True, 44.0, 5.0, 4.0, 2.0)  # standard deviation 2 sqrt 2 over sqrt 2


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(dry_run=True, coarse=True, seeds=1, data=None, out=tmp_path)


def test_an_interrupted_run_starts_anew_or_mixes_protocols(args, monkeypatch):
    path, trained = args.out / "regime_map.json", []

    def fake(problem, widths):
        trained.append(problem)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return [{"width": width} for width in widths]

    monkeypatch.setattr(regime_map, "cells", fake)
    made = {name: regime_map.Row(lambda name=name: name, (4, 8)) for name in "abcd"}
    monkeypatch.setattr(regime_map, "rows", lambda args: made.items())
    with pytest.raises(KeyboardInterrupt):
        regime_map.run(args, path)
    results = regime_map.run(args, path)
    assert trained == ["a", "b", "c", "c", "d"]
    assert results == json.loads(path.read_text())
    assert list(results["problems"]) == ["a", "b", "c", "d"]
    made["a"] = regime_map.Row(lambda: "a", (4, 8, 12))  # a finer map trains what the coarse one did not
    regime_map.run(args, path)
    assert trained[5:] == ["a"]
    args.seeds = 2
    with pytest.raises(SystemExit, match="comes from another protocol"):
        regime_map.run(args, path)


@pytest.fixture(scope="module")
def committed():
    return json.loads((EXAMPLES / "results" / "regime_map.json").read_text())


def test_the_documents_repeat_another_map(committed):
    assert shown("regime_map.md", "regime") == f"{report.table(committed)}\n\n{report.summary(committed)}"


def test_a_map_that_recommends_disk_everywhere_has_no_summary(committed, monkeypatch):
    monkeypatch.setattr(rule, "derive", lambda cells: Rule(-100.0, 100.0))
    assert "where the rule says KD" not in report.summary(committed)


def test_the_committed_map_comes_from_another_protocol(committed):
    args = argparse.Namespace(seeds=committed["protocol"]["seeds"], dry_run=False)
    assert committed["protocol"] == regime_map.protocol(args)


def test_the_committed_map_cannot_be_drawn(committed):
    figure = report.draw(committed)
    figure.canvas.draw()
    maps = [axes for axes in figure.axes if " - KD, " in axes.get_title()]
    synthetic = [each for each in rule.points(committed) if each.synthetic]
    assert sum(len(axes.texts) for axes in maps) == len(synthetic) * len(ARMS)
    assert maps[-1].get_title().endswith(" - KD, 100 classes x 3 clusters")
    (places,) = (axes for axes in figure.axes if axes.get_xlabel().startswith("gap by capacity"))
    assert sum(len(drawn.get_offsets()) for drawn in places.collections) == len(rule.points(committed))
