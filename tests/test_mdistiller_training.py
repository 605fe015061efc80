"""Training in mdistiller: what batches a seed gives, at which rates, what a kill leaves, which files serve as what."""

import hashlib
import random
from types import SimpleNamespace

import numpy as np
import pytest
import test_mdistiller as shared
import torch
from test_mdistiller import image_batch, launch
from torch import nn

host = shared.host
pytestmark = shared.pytestmark

ALTERNATING = ["SOLVER.TRAINER", "disk", "DISK.ALTERNATING.GUIDE_PASSES", "2", "DISK.ALTERNATING.STUDENT_PASSES", "2"]
REPLAY = [*ALTERNATING, "DISK.ALTERNATING.REPLAY", "True"]


# seeds


@pytest.fixture
def batches(monkeypatch):
    """Hashes of what the student trains on, by epoch, and of what the guide's passes show it."""
    seen = SimpleNamespace(student={}, guide={}, loaders=[])
    seen.keep = lambda loader: seen.loaders.append(loader) or loader
    forward = nn.DataParallel.forward

    def watched(self, *inputs, **kwargs):
        if "target" in kwargs:
            kind = seen.student if torch.is_grad_enabled() else seen.guide
            content = kwargs["image"].numpy().tobytes() + kwargs["target"].numpy().tobytes()
            kind.setdefault(kwargs["epoch"], []).append(hashlib.sha256(content).hexdigest()[:16])
        return forward(self, *inputs, **kwargs)

    monkeypatch.setattr(nn.DataParallel, "forward", watched)
    return seen


def batches_of(seen, host, *words, **settings):
    seen.student.clear()
    seen.guide.clear()
    launch(host, *words, **settings)
    for loader in seen.loaders:  # left to the garbage collection, each costs seconds
        loader._iterator = None
    return dict(seen.student)


def test_no_epoch_of_one_seed_shows_the_batches_of_another_seeds_epoch(host, batches):
    runs = [batches_of(batches, host, seed=seed, out=f"out{seed}", epochs=3) for seed in (0, 1, 2)]
    shown = [batch for run in runs for epoch in run.values() for batch in epoch]
    assert len(set(shown)) == len(shown) == 3 * 3 * 3


def test_seeds_and_epochs_are_mixed_and_any_integer_is_a_seed(host):
    shared.registered(host)
    from disk_plugin.integrations.mdistiller.seeds import seed_everything

    def draws(*key):
        seed_everything(*key)
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    seeds = [-1, 0, 1, 2, 5, 2**31, 2**32, 2**32 + 5]
    drawn = {(seed, epoch): draws(seed, epoch) for seed in seeds for epoch in range(241)}
    for generator in zip(*drawn.values(), strict=True):
        assert len(set(generator)) > 0.999 * len(drawn)
    assert len(set(drawn.values())) == len(drawn)
    assert draws(1) == drawn[1, 0]  # the initial weights' numbers are no epoch's
    assert draws(5, 240) == drawn[5, 240]


def persistent(loader, *arguments, num_workers=0, **settings):
    return loader(*arguments, num_workers=num_workers, persistent_workers=num_workers > 0, **settings)


@pytest.mark.parametrize("loader", ["no workers", "workers", "persistent workers"])
def test_under_one_seed_every_method_sees_the_same_batches_in_every_epoch_also_after_resuming(
    host, batches, monkeypatch, loader
):
    if loader == "persistent workers":  # as a fork's loader may have them
        plain = torch.utils.data.DataLoader
        monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *a, **k: batches.keep(persistent(plain, *a, **k)))
    words = ["DATASET.NUM_WORKERS", "0" if loader == "no workers" else "1"]
    expected = batches_of(batches, host, *words, distiller="KD", out="kd", epochs=3)
    assert sorted(expected) == [1, 2, 3]
    for number, (distiller, extra) in enumerate(
        [("DISK", []), ("DISK", ALTERNATING), ("DISK", REPLAY), ("DISK_SIMKD", ALTERNATING)]
    ):
        settings = {"distiller": distiller, "out": f"out{number}"}
        assert batches_of(batches, host, *words, *extra, **settings, epochs=2) == {e: expected[e] for e in (1, 2)}
        if extra:  # other orders and views for the guide, in each of its passes
            guided = [*batches.guide[1], *expected[1]]
            assert len(set(guided)) == len(guided) == 3 * 3
        assert batches_of(batches, host, *words, *extra, "--resume", **settings, epochs=3) == {3: expected[3]}


def test_random_numbers_are_put_back_after_guide_passes_and_theirs_differ(host):
    shared.registered(host)
    from disk_plugin.integrations.mdistiller.seeds import apart

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    expected = draw()
    inside = []
    for number in (1, 2):
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        with apart(number):
            inside.append(draw())
        assert draw() == expected
    for column in zip(expected, *inside, strict=True):
        assert len(set(column)) == 3


# rates of the guide's passes


def rates_of(host, words, *, epochs, first=1):
    """Return the steps of an own trainer, one a pass: whose, and at which rate."""
    words = ["SOLVER.TRAINER", "disk", "SOLVER.EPOCHS", epochs, "SOLVER.LR", 0.1, "DISK.ALTERNATING.LR", 0.1, *words]
    words += ["SOLVER.LR_DECAY_STAGES", [3], "DISK.ALTERNATING.GUIDE_PASSES", 3, "DISK.ALTERNATING.STUDENT_PASSES", 3]
    modules, cfg, distiller = shared.distiller_of(host, "DISK", *words)
    image, target = image_batch()
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self
    wrapped, batch = nn.DataParallel(distiller), [(image, target, torch.arange(8))]
    trainer = modules.engine.trainer_dict["disk"]("own", wrapped, batch, [(image, target)], cfg)
    events, step, train_iter = [], trainer.guide_optimizer.step, trainer.train_iter

    def guide_step():
        events.append(("guide", trainer.guide_optimizer.param_groups[0]["lr"]))
        return step()

    def student_step(data, epoch, meters):
        events.append(("student", trainer.optimizer.param_groups[0]["lr"]))
        return train_iter(data, epoch, meters)

    trainer.guide_optimizer.step, trainer.train_iter = guide_step, student_step
    trainer.train(resume=first > 1)
    return [(kind, round(rate, 6)) for kind, rate in events]


def table(*groups):
    return [(kind, rate) for kind, rate, count in groups for _ in range(count)]


LITERAL_RATES = table(("guide", 0.1, 3), ("student", 0.1, 3), ("guide", 0.01, 3), ("student", 0.01, 3))


@pytest.mark.parametrize("replay", [False, True])
def test_guide_passes_run_at_the_rate_of_the_epochs_they_precede_recorded_or_not(host, replay):
    assert rates_of(host, ["DISK.ALTERNATING.REPLAY", replay], epochs=6) == LITERAL_RATES


def test_a_replayed_run_that_goes_on_makes_the_guide_passes_that_its_last_epoch_left(host):
    words = ["DISK.ALTERNATING.REPLAY", True]
    assert rates_of(host, words, epochs=3) == LITERAL_RATES[:6]
    assert rates_of(host, words, epochs=6, first=4) == LITERAL_RATES[6:]
