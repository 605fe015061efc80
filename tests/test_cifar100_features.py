"""The CIFAR-100 example's methods that read more than logits, CIFD and ScaleKD, alone and guided."""

import json
import sys

import cifar100
import pytest
import torch
from evidence import PAGES
from small_images import data, report, trials
from small_images.experiment import Experiment
from small_images.networks import network, width_of
from small_images.resnet import ResNet, joined
from small_images.training import Recipe, Run
from small_images.views import Views, batches, outputs_of

from disk_plugin.taps import get_tail

FAMILIES = ["cifd", "disk-cifd", "scalekd", "disk-scalekd"]
SETTINGS = {
    "ce": {},
    "kd": {},
    "cifd": {},
    "disk-cifd": {"loss": {}, "cifd": {}},
    "scalekd": {},
    "disk-scalekd": {"loss": {}, "scalekd": {}},
}
pytestmark = pytest.mark.filterwarnings("ignore:the guide is dead", "ignore:in the .* steps of its schedule")


@pytest.fixture
def small(monkeypatch):
    """Shrink a dry run to 200 training images."""
    synthetic, load = data.synthetic, cifar100.arguments
    monkeypatch.setattr(data, "synthetic", lambda samples=240: synthetic(samples))

    def arguments():
        args = load()
        args.held_out = 40
        return args

    monkeypatch.setattr(cifar100, "arguments", arguments)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Where the first experiment leaves its teacher for the others."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture
def experiment(small, monkeypatch, out):
    monkeypatch.setattr(sys, "argv", ["cifar100.py", "--dry-run", "--teacher", "swin", "--out", str(out)])
    return Experiment(cifar100.arguments())


def run_of(experiment, names, folder=None):
    chosen = {name: (name, SETTINGS[name]) for name in names}
    methods = experiment.methods(chosen, epochs=2, seed=1, budget=0.5)
    recipe = Recipe("resnet10-xxs", 2, 1, batch_size=40, progress=False)
    return Run(recipe, methods, None, experiment.views, torch.arange(80), experiment.held_out, folder)


def test_a_swin_shows_what_its_own_tail_makes():
    images = torch.randn(3, 3, 32, 32)
    swin = network("swin").eval()
    logits, features, final = swin.outputs(images, maps=True)
    torch.testing.assert_close(logits, swin(images))
    torch.testing.assert_close(features, final.mean((2, 3)))
    torch.testing.assert_close(swin.head()(features), logits)
    tail = get_tail(swin.body, images)
    assert final.shape[1:] == (width_of("swin"), 2, 2) == (tail.final_width, *tail.final_size)
    entry = swin.body.forward_intermediates(images, indices=[2], intermediates_only=True)[0]
    torch.testing.assert_close(tail(entry), final)


@pytest.mark.parametrize("name", ["resnet10-xxs", "resnet18"])
def test_maps_of_networks_side_by_side_are_those_apart(name):
    images = torch.randn(2, 3, 32, 32)
    apart = [ResNet(name).eval() for _ in range(2)]
    both = ResNet(name, copies=2).eval()
    both.load_state_dict(joined([each.state_dict() for each in apart]))
    for copy, own in enumerate(apart):
        for mine, shared in zip(own.outputs(images, maps=True), both.outputs(images, maps=True), strict=True):
            torch.testing.assert_close(shared.unflatten(1, (2, -1))[:, copy], mine)
    before, last = own.outputs(images, maps=True)[2:]
    assert before.shape[2:] == (8, 8)
    torch.testing.assert_close(own.blocks[own.map_blocks[0] + 1 :](before), last)
    torch.testing.assert_close(own.classifier(last.mean((2, 3))), own(images))


def test_a_batch_has_the_teachers_map_of_its_own_images(experiment, tmp_path):
    for views in (experiment.views, Views(experiment.train, 2, experiment.teacher, None, maps=True)):
        for batch in batches(views, torch.arange(80), 0, 1, 40):
            torch.testing.assert_close(batch.teacher_map.mean((2, 3)), batch.teacher_features, rtol=0.02, atol=0.02)
            with torch.autocast("cpu", torch.bfloat16):
                expected = experiment.teacher.outputs(batch.images, maps=True)[2]
            torch.testing.assert_close(batch.teacher_map, expected.float(), rtol=0.02, atol=0.02)
    assert len(outputs_of(experiment.teacher, experiment.train.images[:4])) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_an_interrupted_run_goes_on_bit_for_bit(experiment, tmp_path, name):
    names = ["kd", name]
    whole = run_of(experiment, names, tmp_path / "whole").fit()
    run_of(experiment, names, tmp_path / "cut").fit_epoch()
    resumed = run_of(experiment, names, tmp_path / "cut")
    assert resumed.epoch == 1
    resumed.fit()
    assert json.dumps(resumed.logs) == json.dumps(whole.logs)  # NaN where no sample is right
    for mine, theirs in zip(resumed.methods.values(), whole.methods.values(), strict=True):
        for key, value in theirs.state_dict().items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(mine.state_dict()[key], value), key
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key


@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_that_is_trained_moves_and_the_teacher_does_not(experiment, name):
    teacher = {key: value.clone() for key, value in experiment.teacher.state_dict().items()}
    run = run_of(experiment, [name])
    groups = [group for optimizer in run.optimizers[1:] for group in optimizer.param_groups]
    optimized = [each for group in groups for each in group["params"]]
    before = [each.detach().clone() for each in optimized]
    run.fit_epoch()
    still = sum(torch.equal(mine, old) for mine, old in zip(optimized, before, strict=True))
    assert still == 0
    owned = [each for each in run.methods[name].parameters() if each.requires_grad]
    assert {id(each) for each in owned} == {id(each) for each in optimized}
    for key, value in experiment.teacher.state_dict().items():
        assert torch.equal(value, teacher[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_a_neighbour_changes_nothing(experiment, name):
    alone = run_of(experiment, ["kd"]).fit()
    beside = run_of(experiment, ["kd", name]).fit()
    for key, value in alone.states()["kd"].items():
        torch.testing.assert_close(beside.states()["kd"][key], value, rtol=0.05, atol=0.05)


def test_every_family_is_searched_alone_and_guided_with_equally_many_trials():
    assert len(trials.SCALEKD_TRIALS) == len(trials.DISK_SCALEKD_TRIALS) == len(trials.KD_TRIALS)
    assert trials.SCALEKD_TRIALS[0] == {"original_weight": 4, "dc_removed_weight": 3}
    named = trials.named("scalekd", trials.SCALEKD_TRIALS, 3)
    assert list(named) == ["scalekd 0", "scalekd 1", "scalekd 2"]
    for each in (trials.SCALEKD_TRIALS, trials.DISK_SCALEKD_TRIALS):
        assert len({json.dumps(settings, sort_keys=True) for settings in each}) == len(each)


def test_a_search_takes_the_first_trials_of_each_method(experiment):
    experiment.args.trials, experiment.args.search_epochs = 1, 1
    found = experiment.search(None)
    assert list(found["rows"]) == ["kd 0", "disk 0"]
    assert found["trials"] == {"kd": 1, "disk": 1}
    assert found["chosen"]["kd"]["settings"] == trials.KD_TRIALS[0]


@pytest.mark.parametrize("flags", [["--search-scalekd"], ["--methods", "ce", "disk-scalekd"]])
def test_scalekd_is_refused_for_a_teacher_without_a_tail(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["cifar100.py", "--data", "x.npz", *flags])
    with pytest.raises(SystemExit):
        cifar100.arguments()
    assert f"{flags[-1]} needs --teacher swin, got resnet10-l" in capsys.readouterr().err


def test_the_report_with_scalekd_runs_as_typed(small, monkeypatch, tmp_path, capsys):
    names = ["kd", "disk-best", "scalekd", "disk-scalekd"]
    flags = ["--dry-run", "--teacher", "swin", "--no-third", "--side-by-side", "4", "--methods", *names]
    monkeypatch.setattr(sys, "argv", ["cifar100.py", *flags, "--out", str(tmp_path)])
    cifar100.main()
    results = json.loads((tmp_path / "cifar100_swin_10-xxs_3.json").read_text())
    search = json.loads((tmp_path / "cifar100_swin_10-xxs_scalekd_search.json").read_text())
    assert list(results["methods"]) == names
    assert {row["method"] for row in search["rows"].values()} == {"scalekd", "disk-scalekd"}
    assert results["protocol"]["settings"]["scalekd"] == search["chosen"]["scalekd"]["settings"]
    assert report.table(results) in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--search", "--search-scalekd"])
def test_a_row_without_its_search_names_the_command(monkeypatch, tmp_path, flag):
    monkeypatch.setattr(cifar100, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["cifar100.py", "--data", "x.npz", "--teacher", "swin", "--methods", "scalekd"])
    name = {"--search": "pair_search.json", "--search-scalekd": "pair_scalekd_search.json"}[flag]
    with pytest.raises(FileNotFoundError, match=rf"{name}, got none: run .*cifar100\.py {flag} .*--teacher swin"):
        cifar100.frozen("pair", flag, cifar100.arguments())
    (tmp_path / name).write_text('{"chosen": {}}')
    assert cifar100.frozen("pair", flag, cifar100.arguments()) == {"chosen": {}}


def test_the_sizes_that_the_page_names(experiment):
    (method,) = experiment.methods({"scalekd": ("scalekd", {})}, epochs=2, seed=0, budget=0.5).values()
    page = (PAGES / "scalekd.md").read_text()
    for count in (
        sum(parameter.numel() for parameter in method.scalekd.trainable_parameters()),
        sum(parameter.numel() for parameter in network("resnet10-xxs").parameters()),
    ):
        assert f"{count:,}" in page
    assert f"{sum(parameter.numel() for parameter in experiment.teacher.parameters()) / 1e6:.1f} million" in page
