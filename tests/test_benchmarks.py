"""The benchmarks' own lines: what is timed is what it is called, intervals are right, figures shown are those kept."""

import importlib
import itertools
import json
import math
import re
from pathlib import Path

import cifar_resnets
import distillation
import pairs
import pytest
import torch
from small_images.resnet import ResNet

FOLDER = Path(__file__).parents[1] / "benchmarks"
TABLES = ("loss", "step", "cached", "cache_read", "timm_step")


def log_softmax(values):
    total = math.log(sum(math.exp(value) for value in values))
    return [value - total for value in values]


def kl(p, q):
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def by_hand(one_sample):
    """Mean over a batch of a function of lists: (student, teacher, label)."""

    def loss(student, teacher, target):
        rows = zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True)
        values = [one_sample(*row) for row in rows]
        return sum(values) / len(values)

    return loss


@by_hand
def kd_by_hand(student, teacher, label, tau=4.0):
    s, t = (log_softmax([value / tau for value in logits]) for logits in (student, teacher))
    return -0.1 * log_softmax(student)[label] + 0.9 * tau**2 * kl(t, s)


@by_hand
def dkd_by_hand(student, teacher, label, tau=4.0):
    """Zhao et al., eq. (7), the others' distribution over the others alone."""
    s, t = (log_softmax([value / tau for value in logits]) for logits in (student, teacher))
    label_or_other = [[p[label], math.log(1 - math.exp(p[label]))] for p in (t, s)]
    others = [
        log_softmax([value / tau for index, value in enumerate(logits) if index != label])
        for logits in (teacher, student)
    ]
    return -log_softmax(student)[label] + tau**2 * (kl(*label_or_other) + 8 * kl(*others))


@pytest.mark.parametrize(
    ("loss", "reference"), [(distillation.kd_loss, kd_by_hand), (distillation.dkd_loss, dkd_by_hand)]
)
def test_neighbours_losses_follow_their_equations(loss, reference):
    student, teacher = 3 * torch.randn(2, 5, 7, dtype=torch.float64)
    target = torch.tensor([0, 6, 3, 3, 1])
    assert loss(student, teacher, target).item() == pytest.approx(reference(student, teacher, target), rel=1e-9)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the steps move."""
    now = [0.0]
    monkeypatch.setattr(pairs.time, "perf_counter", lambda: now[0])

    def taking(seconds):
        seconds = itertools.cycle(seconds)

        def step():
            now[0] += next(seconds)

        return step

    return taking


def test_interval_of_a_ratio_is_between_its_order_statistics(clock):
    times = [float(number) for number in torch.randperm(41) + 1]
    ratio = pairs.compare(clock(times), clock([10.0]), pairs=41, warmup=0)
    # the median is below the k-th smallest of n with probability P(Binomial(n, 1/2) < k)
    below = [sum(math.comb(41, j) for j in range(k)) / 2**41 for k in range(42)]
    k = max(k for k in range(42) if below[k] <= 0.025)
    assert (ratio.low, ratio.high) == pytest.approx((k / 10, (42 - k) / 10))
    assert ratio.median == pytest.approx(2.1)
    assert (ratio.ours, ratio.theirs, ratio.pairs) == (21.0, 10.0, 41)


def test_both_are_timed_by_turns_after_the_warmup(clock):
    order = []
    ours, theirs = clock([2.0]), clock([1.0])
    both = [lambda: (order.append("ours"), ours()), lambda: (order.append("theirs"), theirs())]
    ratio = pairs.compare(*both, pairs=6, warmup=1, calls=2)
    assert order[2::2] == order[3::2]  # each time is of two calls in a row
    assert order[::2] == ["ours", *["theirs", "ours", "ours", "theirs"] * 3]
    assert (ratio.median, ratio.ours, ratio.theirs) == (2.0, 2.0, 1.0)


@pytest.mark.parametrize("name", ["resnet10-l", "resnet10-xxs"])
def test_networks_are_those_of_the_example(name):
    ours, theirs = cifar_resnets.CifarResNet(name, 10), ResNet(name, 10)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images))


# what CRD's and mdistiller's resnet8x4 and resnet32x4 count
@pytest.mark.parametrize(("name", "parameters"), [("resnet8x4", 1_233_540), ("resnet32x4", 7_433_860)])
def test_networks_have_the_size_of_their_namesakes(name, parameters):
    assert sum(each.numel() for each in cifar_resnets.CifarResNet(name).parameters()) == parameters


@pytest.mark.parametrize("name", [*TABLES, "loss_gpu", "step_gpu", "host_steps", "cifd", "scalekd"])
def test_readme_shows_the_figures_that_are_kept(name):
    if name in ("timm_step", "scalekd"):
        pytest.importorskip("timm")
    found = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    shown = re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", (FOLDER / "README.md").read_text(), re.DOTALL)
    assert shown is not None, f"benchmarks/README.md lacks the markers of {name}"
    assert shown[1] == importlib.import_module(name.removesuffix("_gpu")).table(found)
    assert all(row["pairs"] >= 30 for row in found.get("rows", []))
