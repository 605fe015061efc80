"""CIFD: against an oracle written apart, its channels, both stages, KD dropout, the guide's weights, bad input."""

import copy
import inspect
import re
import warnings
from pathlib import Path

import cifd_oracle as oracle
import numpy as np
import pytest
import torch
from processes import leave_group
from torch import nn

from disk_plugin import DiSKLoss, GuideHead
from disk_plugin.cache import SeededViews, TeacherCache
from disk_plugin.features import CIFD, Guided, Outputs, Pair
from disk_plugin.features.cifd import (
    ContrastiveCIFD,
    Embeddings,
    InformationBottleneck,
    RateDistortionModule,
    fit_rdms,
    presets,
)
from disk_plugin.features.cifd.density import FactorizedDensity
from disk_plugin.features.cifd.dropout import SourceDropout
from disk_plugin.features.cifd.embedding_loss import EmbeddingLoss
from disk_plugin.features.cifd.embeddings import Rows
from disk_plugin.features.cifd.stage_a import stage_a_loss
from disk_plugin.taps import with_features
from disk_plugin.uniform import UniformGuide

N, C, S, T = 6, 5, 7, 8  # samples, classes, widths of student and teacher


def perturbed(module, scale=0.3):
    """The module in float64, away from its initial values."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.double().parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.double)
    return module


def as_lists(density, part=slice(None)):
    """A density's parameters as the oracle takes them, of some channels."""
    names = [
        [getattr(density, f"{name}{i}") for i in range(count)]
        for name, count in (("matrix", density.layers), ("bias", density.layers), ("factor", density.layers - 1))
    ]
    return tuple([value.detach().numpy()[part] for value in each] for each in names)


def as_weights(modules, index):
    """One module's layers as the oracle takes them."""
    layers = {"encoder1": modules.encoder[0], "encoder2": modules.encoder[2], "decoder": modules.decoder[0]}
    layers["classifier"] = modules.classifier
    if modules.hidden_dim != modules.dim:
        layers["output"] = modules.decoder[2]
    found = {
        name: (layer.weight[index].detach().numpy().T, layer.bias[index, 0].detach().numpy())
        for name, layer in layers.items()
        if layer is not None
    }
    return {**found, "relu_output": modules.nonnegative}


def fitted(dim=T, classes=C, count=2, **settings):
    """Modules that say they were fitted, with weights of random values."""
    weights = tuple(1000.0 / 2**i for i in range(count))
    modules = perturbed(RateDistortionModule(dim, classes, distortion_weights=weights, **settings), 0.8)
    modules.report = {"rate": [1.0] * count, "distortion": [1.0] * count, "accuracy": None, "samples": 1}
    return modules.eval()


def batch(seed=0, dtype=torch.double):
    """Outputs of student and teacher, and labels."""
    torch.manual_seed(seed)
    features, head = torch.rand(N, S, dtype=dtype), nn.Linear(S, C, dtype=dtype)
    features.requires_grad_()
    student = Outputs(head(features), features, head=head)
    return student, Outputs(2 * torch.randn(N, C, dtype=dtype), torch.rand(N, T, dtype=dtype)), torch.arange(N) % C


# ---- channel and density ---------------------------------------------------------------------------------------------


def test_noise_is_uniform_in_training_and_absent_or_rounded_in_evaluation():
    bottleneck, features = InformationBottleneck(S), torch.rand(2000, S)
    noise = bottleneck(features) - features
    assert noise.abs().max() <= 0.5 + 1e-6
    assert noise.mean().abs() < 0.01
    assert noise.var().item() == pytest.approx(1 / 12, rel=0.03)
    assert not torch.equal(bottleneck(features), bottleneck(features))
    assert bottleneck.eval()(features) is features
    modules, embeddings = fitted(), torch.rand(20, T, dtype=torch.double)
    code = modules(embeddings).code
    assert torch.equal(code, code.round())
    assert code.unique().numel() > 1
    assert torch.equal(code, modules(embeddings).code)
    assert not torch.equal(modules.train()(embeddings).code, code)


def test_gain_narrows_the_noise_and_is_what_the_density_sees():
    bottleneck, features = InformationBottleneck(S, gain=4.0), torch.rand(500, S)
    noisy = bottleneck(features)
    assert 0.1 < (noisy - features).abs().max() <= 0.125 + 1e-6
    torch.testing.assert_close(bottleneck.rate(noisy), bottleneck.density.rate(4 * noisy).sum(1))


def test_density_and_rate_are_the_oracles():
    density, values = perturbed(FactorizedDensity(4)), 20 * torch.randn(N, 4, dtype=torch.double)
    parts = as_lists(density)
    expected = oracle.cumulative_logit(values.numpy(), *parts)
    np.testing.assert_allclose(density.cumulative_logits(values).detach(), expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(density.rate(values).sum(1).detach(), oracle.rate(values.numpy(), *parts), rtol=1e-10)
    probability = oracle.bin_probability(values.numpy(), *parts)
    np.testing.assert_allclose((-density.rate(values)).exp().detach(), probability, rtol=1e-10)


def test_density_is_a_distribution_and_survives_far_values():
    density = FactorizedDensity(3)
    bins = torch.arange(-100.0, 101).unsqueeze(1).expand(-1, 3)
    probability = (-density.rate(bins)).exp()
    assert (probability > 0).all()
    torch.testing.assert_close(probability.sum(0), torch.ones(3), atol=1e-3, rtol=0)
    logits = density.cumulative_logits(torch.linspace(-50, 50, 400).unsqueeze(1).expand(-1, 3))
    assert (logits.diff(dim=0) > 0).all()
    for size in (1e4, 1e8):
        far = torch.tensor([[size, -size, 0.0]], requires_grad=True)
        rate = density.rate(far)
        (gradient,) = torch.autograd.grad(rate.sum(), far)
        assert rate.isfinite().all()
        assert gradient.isfinite().all()
        if size == 1e4:
            assert gradient[0, 0] > 0 > gradient[0, 1]  # both are pulled back


def test_rate_is_a_sum_over_channels_and_reaches_the_encoder():
    modules = fitted(count=3).requires_grad_(True).train()
    embeddings = torch.rand(1, T, dtype=torch.double)
    code = modules(embeddings).code
    rate = modules.rate(code)
    assert rate.shape == (3, 1)
    for n in range(3):
        part = slice(n * modules.hidden_dim, (n + 1) * modules.hidden_dim)
        by_hand = oracle.rate(code[n].detach().numpy(), *as_lists(modules.density, part))
        np.testing.assert_allclose(rate[n].detach(), by_hand, rtol=1e-10)
    gradients = torch.autograd.grad(rate.sum(), list(modules.encoder.parameters()))
    assert all(gradient.any() for gradient in gradients)


def test_density_under_autocast_is_that_in_single_precision():
    density, values = FactorizedDensity(3), 5 * torch.randn(N, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = density.rate(values)
    torch.testing.assert_close(found, density.rate(values))
    assert density.rate(values.bfloat16()).dtype == torch.float32


# ---- stage A ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mse", "smooth_l1"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("settings", [{}, {"hidden_dim": 3}, {"nonnegative": False}])
def test_stage_a_is_the_oracles(kind, reduction, settings, monkeypatch):
    modules = fitted(count=2, **settings).train()
    rows = Rows(torch.rand(N, T).double(), torch.randn(N, C).double(), torch.arange(N) % C)
    noise = torch.rand(2, N, modules.hidden_dim, dtype=torch.double)
    monkeypatch.setattr(torch, "rand_like", lambda code: noise)
    how = {"ce_weight": 0.7, "kl_weight": 1.3, "temperature": 2.5, "reduction": reduction}
    loss, _ = stage_a_loss(modules, rows, kind=kind, **how)
    for n, weight in enumerate(modules.distortion_weights):
        part = slice(n * modules.hidden_dim, (n + 1) * modules.hidden_dim)
        given = rows.features.numpy(), rows.target.numpy(), rows.logits.numpy(), as_weights(modules, n)
        density = as_lists(modules.density, part)
        expected = oracle.stage_a_loss(*given, density, noise[n].numpy() - 0.5, weight, kind=kind, **how)
        for name, value in {
            "total": "loss",
            "rate": "rate",
            "distortion": "distortion",
            "ce": "ce",
            "kl": "kl",
        }.items():
            np.testing.assert_allclose(getattr(loss, name)[n].detach(), expected[value], rtol=1e-10, atol=1e-10)


def relu_features(samples=600, dim=16, classes=4, seed=0):
    """Features of a two-layer teacher, its logits and its classes."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(samples, 6, generator=generator) @ torch.randn(6, dim, generator=generator)
    features = (hidden / 2).relu()
    logits = features @ torch.randn(dim, classes, generator=generator)
    return Embeddings(features, logits, logits.argmax(1))


FAST = {"epochs": 40, "lr": 5e-3, "batch_size": 64, "held_out": 0.2, "progress": False}


def test_less_weight_on_the_distortion_costs_fewer_nats_and_more_distortion():
    modules = fit_rdms(
        relu_features(), distortion_weights=(2000.0, 200.0, 20.0), reduction="mean", distortion="smooth_l1", **FAST
    )
    rate, distortion = modules.report["rate"], modules.report["distortion"]
    assert rate[0] > rate[1] > rate[2]
    assert distortion[0] < distortion[1] < distortion[2]
    assert modules.report["accuracy"][0] > 75
    assert modules.report["teacher_accuracy"] == 100
    assert modules.report["samples"] == 120
    assert modules.fitted
    assert not modules.training
    assert not any(parameter.requires_grad for parameter in modules.parameters())


def test_modules_fitted_together_are_those_fitted_alone(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", lambda code: torch.full_like(code, 0.25))
    both = RateDistortionModule(16, 4, distortion_weights=(200.0, 20.0))
    alone = RateDistortionModule(16, 4, distortion_weights=(20.0,))
    for name, value in both.state_dict().items():
        if isinstance(value, torch.Tensor):
            alone.state_dict()[name].copy_(value[value.shape[0] // 2 :])
    how = {**FAST, "epochs": 3, "reduction": "mean"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_rdms(relu_features(), modules=both, **how)
        fit_rdms(relu_features(), modules=alone, **how)
    for name in ("rate", "distortion", "accuracy"):
        assert both.report[name][1] == pytest.approx(alone.report[name][0], rel=1e-4)


def test_fitting_is_repeatable_and_leaves_the_random_state():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    states = [
        fit_rdms(relu_features(100), reduction="mean", distortion_weights=(100.0,), **FAST | {"epochs": 2}).state_dict()
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in states[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states[1][name]), name


def test_fitting_reads_a_cache_or_one_pass_of_a_loader(tmp_path):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(3, T), nn.ReLU(), nn.Dropout(0.5), nn.Linear(T, C))
    x, y = torch.randn(40, 3), torch.arange(40) % C
    dataset = torch.utils.data.TensorDataset(x, y)
    cache = TeacherCache.write(tmp_path, teacher, SeededViews(dataset, views=2), progress=False)
    calls = []
    teacher[0].register_forward_hook(lambda module, *_: calls.append(teacher.training))
    how = {**FAST, "epochs": 2, "distortion_weights": (100.0,), "reduction": "mean"}
    loader = torch.utils.data.DataLoader(dataset, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_loader = fit_rdms(loader, teacher=teacher, **how)
        assert calls == [False] * 3
        assert teacher.training
        by_cache = fit_rdms(cache, targets=y, **how)
    assert len(calls) == 3
    assert by_cache.report["rate"] == pytest.approx(by_loader.report["rate"], rel=0.01)
    with pytest.raises(ValueError, match="targets must have one for each of the cache's 40 samples, got none"):
        fit_rdms(cache)


def test_embeddings_without_classes_are_fitted_by_eq_4_alone():
    modules = fit_rdms(Embeddings(torch.randn(100, 6)), distortion_weights=(50.0,), **FAST | {"epochs": 2})
    assert modules.classifier is None
    assert not modules.nonnegative  # embeddings of both signs
    assert modules.report["accuracy"] is None


def test_accuracy_that_falls_where_r_rises_is_told():
    embeddings = relu_features()
    modules = RateDistortionModule(16, 4, distortion_weights=(1e3, 1e-3))
    with torch.no_grad():
        modules.encoder[2].weight[1] *= 100  # the second is not squeezed: it drowns the noise
        modules.decoder[0].weight[0] = 0
        modules.classifier.weight[0] = 0
    with pytest.warns(UserWarning, match=r"R = 1000 is less accurate than that with R = 0.001.*reduction='mean'"):
        fit_rdms(embeddings, modules=modules, reduction="mean", **FAST | {"epochs": 1, "lr": 3e-3})


def test_modules_are_saved_and_loaded(tmp_path):
    modules = fitted(count=3, hidden_dim=4, nonnegative=False).float()
    modules.save(tmp_path / "rdms.pt")
    loaded = RateDistortionModule.load(tmp_path / "rdms.pt")
    x = torch.randn(4, T)
    assert loaded.fitted
    assert not loaded.training
    assert loaded.distortion_weights == modules.distortion_weights
    assert torch.equal(loaded(x).reconstruction, modules(x).reconstruction)
    assert len(list(tmp_path.iterdir())) == 1
    torch.save({"state": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"must be written by RateDistortionModule\.save"):
        RateDistortionModule.load(tmp_path / "other.pt")


def test_modules_have_the_papers_sizes():
    resnet34, resnet50 = (RateDistortionModule(dim, 1000, distortion_weights=(1.0,)) for dim in (512, 2048))
    layers = [sum(p.numel() for name, p in m.named_parameters() if "density" not in name) for m in (resnet34, resnet50)]
    assert layers[0] == 3 * (512 * 512 + 512) + 513 * 1000  # 1.30 M multiplications, as in the paper's appendix D.2
    assert resnet50.hidden_dim == 1024
    assert sum(p.numel() for p in resnet34.density.parameters()) == 43 * 512


# ---- stage B ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mse", "smooth_l1"])
@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_stage_b_is_the_oracles(kind, gain, monkeypatch):
    student, teacher, target = batch()
    weights = {"ce_weight": 0.4, "kl_weight": 1.7, "temperature": 3.0, "embedding_weight": 20.0, "rate_weight": 0.03}
    rdms, how = fitted(), {**weights, "distortion": kind}
    cifd = CIFD(S, T, rdms=rdms, rdm_weights=(0.5, 2.0), gain=gain, dropout=0.5, **how).double()
    perturbed(cifd.embeddings.bottleneck)
    noise, keep = torch.rand(N, S, dtype=torch.double), torch.tensor([1.0, 0.0, 1.0])
    monkeypatch.setattr(torch, "rand_like", lambda features: noise)
    monkeypatch.setattr(cifd.dropout, "forward", lambda: keep)
    logits, losses = cifd.evaluate(student, teacher, target)
    linear = cifd.embeddings.projector
    expected = oracle.stage_b_loss(
        student.features.detach().numpy(),
        noise.numpy() - 0.5,
        gain,
        [p.detach().numpy() for p in student.head.parameters()],
        [p.detach().numpy() for p in linear.parameters()],
        as_lists(cifd.embeddings.bottleneck.density),
        teacher.features.numpy(),
        teacher.logits.numpy(),
        [as_weights(rdms, n) for n in range(2)],
        target.numpy(),
        {**how, "module_weights": [0.5, 2.0]},
        keep.numpy(),
    )
    np.testing.assert_allclose(logits.detach(), expected["logits"], rtol=1e-10)
    names = {"ce": "ce", "kl": "kl", "kl_rdms": "kl_modules", "embedding": "embedding", "rate": "rate"}
    assert losses.keys() == names.keys()
    for name, theirs in names.items():
        np.testing.assert_allclose(losses[name].detach(), expected[theirs], rtol=1e-10, atol=1e-10)
    total = sum(losses.values()).detach()
    np.testing.assert_allclose(total, expected["total"], rtol=1e-10)
    # guided: what the guide weighs, with the same noise and mask
    guided = Guided(DiSKLoss(UniformGuide(0.3)), cifd, weight="one_minus_guide", logit_loss=False)
    found = guided.terms(student, teacher, target, reduction="none")
    w = (1 - found.disk.guide).double().numpy()
    np.testing.assert_allclose(found.student_loss.detach(), oracle.guided_total(expected, w), rtol=1e-6)


def test_without_modules_noise_and_rate_it_is_plain_kd():
    student, teacher, target = batch()
    cifd = CIFD(S, T, distortion_weights=(), embedding_weight=0.0, rate_weight=0.0, temperature=4.0).eval()
    losses = cifd(student, teacher, target)
    assert not losses["embedding"].any()
    assert not losses["rate"].any()
    s, t = student.logits / 4, teacher.logits / 4
    kl = 16 * (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
    ce = nn.functional.cross_entropy(student.logits, target, reduction="none")
    torch.testing.assert_close(losses["kl"] + losses["ce"], kl + ce, rtol=1e-10, atol=1e-10)


def test_modules_that_are_the_teacher_multiply_its_terms(monkeypatch):
    student, teacher, target = batch()
    rdms = fitted(count=3)

    def perfect(embeddings):
        return RateDistortionModule.forward(rdms, embeddings)._replace(
            reconstruction=embeddings.expand(3, -1, -1), logits=teacher.logits.expand(3, -1, -1)
        )

    monkeypatch.setattr(rdms, "forward", perfect)
    cifd = CIFD(S, T, rdms=rdms, rdm_weights=(0.5, 1.0, 2.0), dropout=0.0).double()
    torch.manual_seed(1)
    whole = cifd(student, teacher, target)
    only = CIFD(S, T, distortion_weights=(), dropout=0.0).double()
    only.embeddings.projector = cifd.embeddings.projector
    torch.manual_seed(1)
    alone = only(student, teacher, target)
    torch.testing.assert_close(whole["embedding"], 4.5 * alone["embedding"])
    torch.testing.assert_close(whole["kl"] + whole["kl_rdms"], 4.5 * alone["kl"])


def test_kd_dropout_leaves_out_whole_sources():
    student, teacher, target = batch()
    everything = CIFD(S, T, rdms=fitted(), dropout=1.0).double()(student, teacher, target)
    assert all(not everything[name].any() for name in ("kl", "kl_rdms", "embedding"))
    assert all(everything[name].all() for name in ("ce", "rate"))
    dropout = SourceDropout(4, 0.25, seed=5)
    masks = torch.stack([dropout() for _ in range(20_000)])
    assert masks.mean(0).tolist() == pytest.approx([0.75] * 4, abs=0.01)
    together = torch.corrcoef(masks.t()) - torch.eye(4)
    assert together.abs().max() < 0.03
    following = (masks[1:] * masks[:-1]).mean(0)
    assert following.tolist() == pytest.approx([0.75**2] * 4, abs=0.015)
    assert torch.equal(SourceDropout(4, 0.0)(), torch.ones(4))
    assert torch.equal(SourceDropout(4, 1.0).eval()(), torch.ones(4))
    # a mask is shared by both terms of a source
    cifd = CIFD(S, T, rdms=fitted(count=1), dropout=0.5).double()
    for _ in range(20):
        losses = cifd(student, teacher, target)
        assert bool(losses["kl_rdms"].any()) <= bool(losses["embedding"].any())


def test_kd_dropout_goes_on_where_it_was_saved_and_is_equal_for_equal_seeds():
    first, second, other = SourceDropout(3, 0.5, 1), SourceDropout(3, 0.5, 1), SourceDropout(3, 0.5, 2)
    early = [first() for _ in range(10)]
    assert all(torch.equal(a, second()) for a in early)
    assert not all(torch.equal(a, other()) for a in early)
    resumed = SourceDropout(3, 0.5, 1)
    resumed.load_state_dict(first.state_dict())
    assert all(torch.equal(first(), resumed()) for _ in range(10))


def test_what_is_frozen_gets_no_gradient_and_keeps_its_buffers():
    student, teacher, target = batch()
    rdms = fitted()
    teacher = teacher._replace(features=teacher.features.requires_grad_(), logits=teacher.logits.requires_grad_())
    before = copy.deepcopy(rdms.state_dict())
    cifd = CIFD(S, T, rdms=rdms, dropout=0.0).double().train()
    assert not rdms.training  # in which it rounds
    sum(loss.sum() for loss in cifd(student, teacher, target).values()).backward()
    assert all(parameter.grad is None for parameter in rdms.parameters())
    assert teacher.features.grad is None
    assert teacher.logits.grad is None
    trained = cifd.trainable_parameters()
    assert all(parameter.grad.any() for parameter in trained)
    assert not {id(p) for p in rdms.parameters()} & {id(p) for p in trained}
    assert student.features.grad.all()
    after = rdms.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if isinstance(value, torch.Tensor))


def test_projector_is_there_only_where_widths_differ():
    assert isinstance(EmbeddingLoss(4, 4).projector, nn.Identity)
    assert isinstance(EmbeddingLoss(4, 6).projector, nn.Linear)


def test_evaluation_is_the_students_own_prediction():
    student, teacher, target = batch()
    cifd = CIFD(S, T, rdms=fitted()).double().eval()
    logits, _ = cifd.evaluate(student, teacher, target)
    assert logits is student.logits
    assert cifd.predict(student) is student.logits


def test_weights_of_the_guide():
    student, teacher, target = batch()
    cifd = CIFD(S, T, rdms=fitted(), dropout=0.0, ce_weight=0.0, kl_weight=0.5, rate_weight=0.0).double()
    for module in (cifd, cifd.embeddings.bottleneck):
        module.training = False
    torch.manual_seed(0)
    plain = cifd(student, teacher, target)
    plain = plain["embedding"] + plain["kl_rdms"]
    for g in (0.0, 1.0):
        guided = Guided(DiSKLoss(UniformGuide(g)), cifd, logit_loss=True, weight="one_minus_guide")
        found = guided.terms(student, teacher, target, reduction="none")
        own = found.student_loss - found.disk.student_loss
        torch.testing.assert_close(own, (1 - g) * plain, rtol=1e-4, atol=1e-5)


def test_guided_takes_disks_own_loss_on_logits_in_place_of_ce_and_kl():
    student, teacher, target = batch()
    cifd = CIFD(S, T, rdms=fitted(), dropout=0.0).double().eval()
    guided, disk = Guided(DiSKLoss(GuideHead(C)).double(), cifd), DiSKLoss(UniformGuide(0.0))
    assert guided.logit_loss
    assert not Guided(disk, cifd, logit_loss=False).logit_loss
    terms = Guided(disk, cifd).terms(student, teacher, target)
    losses = cifd(student, teacher, target)
    expected = sum(losses[name].mean() for name in ("kl_rdms", "embedding", "rate")) + terms.disk.student_loss
    torch.testing.assert_close(terms.student_loss, expected)


def test_ignored_labels_and_embeddings_that_are_not_finite():
    student, teacher, target = batch()
    target[1] = -100
    features = teacher.features.clone()
    features[2] = torch.nan
    cifd = CIFD(S, T, rdms=fitted(), dropout=0.0).double()
    losses = cifd(student, teacher._replace(features=features), target)
    assert all(not loss[1] for loss in losses.values())
    assert losses["embedding"][2].isnan()  # loud
    sum(loss.nansum() for loss in losses.values()).backward()
    assert student.features.grad.isfinite().all()
    assert not student.features.grad[1].any()


def test_soft_targets_and_half_precision():
    student, teacher, _ = batch(dtype=torch.float32)
    target = torch.randn(N, C).softmax(1)
    cifd = CIFD(S, T, rdms=fitted().float(), dropout=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        half = student._replace(features=student.features.bfloat16())
        logits, losses = cifd.evaluate(half, teacher, target)
    assert logits.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert all(loss.isfinite().all() for loss in losses.values())
    cifd.bfloat16()  # as in a host whose models are in half precision
    cifd(half._replace(head=student.head.bfloat16()), teacher._replace(features=teacher.features.bfloat16()), target)


def test_built_for_a_pair_it_is_prepared_once(tmp_path):
    torch.manual_seed(0)
    taps = with_features(nn.Linear(3, C)), with_features(nn.Sequential(nn.Linear(3, T), nn.ReLU(), nn.Linear(T, C)))
    x, y = torch.randn(64, 3), torch.arange(64) % C
    pair = [Outputs(*tap(x[:2]), head=tap.head) for tap in taps]
    cifd = CIFD.for_pair(Pair(*pair, lambda: None), distortion_weights=[100.0, 10.0], reduction="mean", rdm_epochs=2)
    assert not cifd.prepared
    outputs = [Outputs(*(value.detach() for value in tap(x)), head=tap.head) for tap in taps]
    with pytest.raises(ValueError, match="must be fitted before the student's training, got new ones: call fit_rdms"):
        cifd(*outputs, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = cifd.prepare([(outputs[1], y)], folder=tmp_path, progress=False)
    assert "| 100 |" in table
    assert cifd.prepared
    cifd(*outputs, y)
    fresh = CIFD.for_pair(Pair(*pair, lambda: None), distortion_weights=[100.0, 10.0])
    fresh.load_state_dict(cifd.state_dict())
    assert fresh.prepared
    named = CIFD.for_pair(Pair(*pair, lambda: None), rdms_file=str(tmp_path / "rdms.pt"))
    assert named.prepared
    assert named.embeddings.rdms.distortion_weights == (100.0, 10.0)


def test_compiled_it_is_the_same():
    student, teacher, target = batch(dtype=torch.float32)
    cifd = CIFD(S, T, rdms=fitted().float(), dropout=0.5)
    cifd.embeddings.bottleneck.warned.append(True)
    seen = []
    for run in (cifd, torch.compile(cifd, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        cifd.dropout.step.zero_()
        seen.append([run(student, teacher, target) for _ in range(3)])
    for ours, compiled in zip(*seen, strict=True):
        for name, loss in ours.items():
            torch.testing.assert_close(loss, compiled[name])


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RateDistortionModule(4, distortion_weights=(1.0, 0.0)), ValueError, r"\(R\) must be > 0, got 0.0"),
        (lambda: RateDistortionModule(4, distortion_weights=()), ValueError, "a number per module, got none"),
        (lambda: RateDistortionModule(4, distortion_weights=3.0), TypeError, "a sequence of numbers, got float"),
        (lambda: fitted()(torch.rand(2, 3)), ValueError, r"must have shape \(N, 8\), got \(2, 3\)"),
        (lambda: EmbeddingLoss(4, 6, projector=False), ValueError, "got 4 and 6: set projector=True"),
        (lambda: CIFD(S, T, rdms=fitted(), rdm_weights=(1.0, 2.0, 3.0)), ValueError, "each of the 2 modules, got 3"),
        (lambda: CIFD(S, T, rdms=fitted(), rdm_weights=(-1.0,)), ValueError, "rdm_weights must be >= 0, got -1.0"),
        (lambda: CIFD(S, T + 1, rdms=fitted()), ValueError, "the teacher's width 9, got some for 8"),
        (lambda: CIFD(S, T, dropout=1.5, distortion_weights=()), ValueError, "dropout must be <= 1, got 1.5"),
        (lambda: CIFD(S, T, temperature=0.0), ValueError, "temperature must be > 0, got 0.0"),
        (lambda: InformationBottleneck(4, gain=0.0), ValueError, "gain must be > 0, got 0.0"),
        (lambda: Embeddings(torch.full((3, 2), torch.nan)), ValueError, r"in 3 of 3 rows, such as \[0, 1, 2\]"),
        (lambda: Embeddings(torch.rand(3, 2), torch.rand(2, 5)), ValueError, "each of the 3 embeddings, got 2"),
        (lambda: Embeddings(torch.rand(3, 2), torch.rand(3, 5)), ValueError, "go together, got one of them"),
        (lambda: fit_rdms([(torch.rand(2, 3), torch.arange(2))]), TypeError, "needs teacher="),
        (lambda: fit_rdms(3), TypeError, "a TeacherCache or a loader, got int"),
        (lambda: fit_rdms(relu_features(), reduction="max"), ValueError, r"one of \['mean', 'sum'\], got 'max'"),
        (lambda: fit_rdms(relu_features(), held_out=0.0), ValueError, "held_out must be > 0, got 0.0"),
        (lambda: fit_rdms(relu_features(), held_out=1.0), ValueError, "held_out must be <= 0.5, got 1.0"),
        (
            lambda: fit_rdms(relu_features(), modules=RateDistortionModule(16, 3)),
            ValueError,
            "of width 16 and 3 classes, got width 16 and 4 classes",
        ),
        (
            lambda: Embeddings(torch.rand(2, 2), torch.full((2, 5), torch.nan), torch.arange(2)),
            ValueError,
            "logits must",
        ),
        (
            lambda: Embeddings(torch.rand(2, 2), torch.rand(2, 5), -torch.ones(2).long()),
            ValueError,
            "0 to 4, got -1 to",
        ),
        (
            lambda: Embeddings(torch.rand(2, 2), torch.rand(2, 5), torch.ones(2).int()),
            TypeError,
            "int64, got torch.int32",
        ),
        (lambda: CIFD(S, T, C, reduction="max"), ValueError, r"reduction must be one of \['mean', 'sum'\], got 'max'"),
        (lambda: CIFD(S, T, C, rdm_epochs=0), ValueError, "rdm_epochs must be >= 1, got 0"),
        (lambda: CIFD(S, T, rdms=nn.Linear(2, 2)), TypeError, "rdms must be a RateDistortionModule, got Linear"),
        (lambda: CIFD(S, T, C, distortion_weights=3.0), TypeError, "a sequence of numbers, got float"),
        (lambda: CIFD(S, T, rdms_file="nowhere.pt"), FileNotFoundError, "must be in nowhere.pt, found no such file"),
        (
            lambda: CIFD(S, T, rdms=fitted(classes=3))(*batch(dtype=torch.float32)),
            ValueError,
            "for the logits' 5 classes, got some for 3",
        ),
        (lambda: CIFD(S, T)(*batch(dtype=torch.float32)), ValueError, "must be fitted"),
        (
            lambda: CIFD(S, T, allow_unfitted=True)(*batch(dtype=torch.float32)),
            ValueError,
            "for the logits' 5 classes, got some for 0",
        ),
        (lambda: fit_rdms(relu_features(1), progress=False), ValueError, "to train on and to hold out, got 1"),
    ],
)
def test_bad_input_names_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_a_host_did_not_give_is_named():
    student, teacher, target = batch()
    cifd = CIFD(S, T, rdms=fitted()).double()
    for shown, message in (
        ((student._replace(head=None), teacher), "needs Outputs.head of the student"),
        ((student._replace(features=None), teacher), "needs Outputs.features"),
        ((student, teacher._replace(features=None)), "needs Outputs.features"),
        ((student, teacher._replace(features=teacher.features[:, :3])), r"must have shape \(6, 8\), got \(6, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            cifd(*shown, target)
    lost = student._replace(head=nn.Linear(S, C).double())
    with pytest.raises(ValueError, match="does not make its logits"):
        CIFD.for_pair(Pair(lost, teacher, lambda: None))


def test_features_that_the_noise_drowns_are_told_once_with_a_gain():
    features = 0.01 * torch.rand(50, 3)
    bottleneck = InformationBottleneck(3)
    with pytest.warns(
        UserWarning, match=r"standard deviation is 0.00\d+ in this batch, the noise's 0.29; unless .* give gain="
    ):
        bottleneck(features)
    bottleneck(features)
    gain = 0.5 / features.var(0).mean().sqrt().item()
    InformationBottleneck(3, gain=gain)(features)
    InformationBottleneck(3).eval()(features)


def test_unfitted_modules_are_allowed_where_asked():
    student, teacher, target = batch(dtype=torch.float32)
    cifd = CIFD(S, T, C, allow_unfitted=True)
    assert cifd.prepared
    assert cifd(student, teacher, target)["kl_rdms"].isfinite().all()


# ---- pairs of embeddings, published settings -------------------------------------------------------------------------


def clip_pair(**settings):
    torch.manual_seed(0)
    image = EmbeddingLoss(6, T, fitted(classes=0, nonnegative=False), distortion="mse")
    text = EmbeddingLoss(T, T, fitted(classes=0, nonnegative=False), distortion="mse")
    return ContrastiveCIFD(image, text, **settings).double()


def test_pairs_of_embeddings_follow_the_paper():
    both = clip_pair(contrastive_weight=0.3).eval()
    image, text = torch.randn(N, 6).double(), torch.randn(N, T).double()
    teachers = torch.randn(2, N, T).double()
    losses = both(image, text, *teachers, logit_scale=7.0)
    u, v = (nn.functional.normalize(each, dim=1) for each in (both.image.projector(image), text))
    expected = []
    for i in range(N):
        row = torch.stack([7 * (u[i] * v[j]).sum() for j in range(N)])
        column = torch.stack([7 * (u[j] * v[i]).sum() for j in range(N)])
        expected.append(-(row.log_softmax(0)[i] + column.log_softmax(0)[i]) / 2)
    torch.testing.assert_close(losses["contrastive"], 0.3 * torch.stack(expected))
    own = both.text(text, teachers[1])
    torch.testing.assert_close(losses["text"], own.embedding)
    torch.testing.assert_close(losses["rate"], own.rate + both.image(image, teachers[0]).rate)
    clip_pair()(image, text, *teachers)["image"].sum().backward()
    with pytest.raises(ValueError, match="must be pairs, got 6 and 5"):
        both(image, text[:5], *teachers)
    with pytest.raises(TypeError, match="text must be an EmbeddingLoss, got Linear"):
        ContrastiveCIFD(both.image, nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["CIFAR100", "IMAGENET_RESNET34_RESNET18", "IMAGENET_RESNET50_MOBILENETV1", "CLIP"])
def test_published_settings_are_those_of_the_constructors(name):
    preset = getattr(presets, name)
    inspect.signature(fit_rdms).bind("source", **preset["fit"])
    if name == "CLIP":
        clip_pair(**preset["contrastive"])
        EmbeddingLoss(4, 6, **preset["method"])
    else:
        CIFD(16, 32, distortion_weights=(), **preset["method"])
    assert preset["recipe"]


def test_every_published_setting_says_whose_it_is():
    source = Path(presets.__file__).read_text()
    lines = [line for line in source.splitlines() if "_IMAGENET_METHOD," not in line]
    values = [line for line in lines if re.match(r' +"\w+": [^{]+,', line) or "**_IMAGENET" in line]
    assert len(values) > 50
    assert all(re.search(r"# (paper|ours)", line) for line in values), values


# ---- several processes -----------------------------------------------------------------------------------------------


def fit_one_part(rank, folder):
    """Fit in one of two processes, each with other samples, and other values at first."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    whole = relu_features(600).rows
    part = Embeddings(*(value[rank : 600 - 20 * rank : 2] for value in whole))  # one has fewer than the other
    torch.manual_seed(rank)
    modules = RateDistortionModule(16, 4, distortion_weights=(2000.0, 20.0))
    fit_rdms(part, modules=modules, shared=True, reduction="mean", **FAST | {"epochs": 10})
    dropout = SourceDropout(3, 0.5, seed=4)
    torch.save({"state": modules.state_dict(), "masks": [dropout() for _ in range(9)]}, f"{folder}/{rank}")
    leave_group()


def test_two_processes_fit_the_same_modules_each_on_its_part(tmp_path):
    torch.multiprocessing.spawn(fit_one_part, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    for name, value in first["state"].items():
        same = torch.equal(value, second["state"][name]) if isinstance(value, torch.Tensor) else True
        assert same, name
    report = first["state"]["_extra_state"]["report"]
    assert report == second["state"]["_extra_state"]["report"]
    assert report["rate"][0] > report["rate"][1]
    assert all(torch.equal(*pair) for pair in zip(first["masks"], second["masks"], strict=True))


# ---- what a review found ---------------------------------------------------------------------------------------------


def test_a_sample_that_the_guide_discounts_has_no_gradient_of_the_embeddings():
    student, teacher, target = batch()
    cifd = CIFD(S, T, rdms=fitted(), dropout=0.0, rate_weight=0.0).double().eval()
    disk = DiSKLoss(UniformGuide(0.0))
    guided = Guided(disk, cifd, logit_loss=True)
    prediction, losses = cifd.evaluate(student, teacher, target)
    terms = disk.terms(prediction, teacher.logits, target, reduction="none")
    w = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 1.0])
    weighed = guided.weigh(prediction, target, teacher, losses, sample_weight=w)
    own = (weighed.student_loss - w * terms.student_loss).sum()
    (gradient,) = torch.autograd.grad(own, student.features, retain_graph=True)
    (whole,) = torch.autograd.grad(sum(losses[n] for n in ("kl_rdms", "embedding")).sum(), student.features)
    assert not gradient[1].any()
    torch.testing.assert_close(gradient, w.unsqueeze(1) * whole, rtol=1e-6, atol=1e-9)


def test_disks_own_loss_is_not_left_out_by_kd_dropout():
    student, teacher, target = batch(dtype=torch.float32)
    for dropout in (0.0, 1.0):
        cifd = CIFD(S, T, rdms=fitted().float(), dropout=dropout, rate_weight=0.0)
        torch.manual_seed(0)
        found = Guided(DiSKLoss(UniformGuide(0.0)), cifd).terms(student, teacher, target)
        assert bool(found.feature) == (dropout == 0.0)
        assert found.disk.distill > 0


def test_the_classifier_learns_from_noisy_features():
    student, teacher, target = batch()
    cifd = CIFD(S, T, rdms=fitted(), dropout=0.0).double()
    logits, _ = cifd.evaluate(student, teacher, target)
    torch.manual_seed(0)
    again, _ = cifd.evaluate(student, teacher, target)
    torch.manual_seed(0)
    noisy = cifd.embeddings.bottleneck(student.features)
    assert not torch.equal(logits, again)
    torch.testing.assert_close(again, student.head(noisy))


def test_modules_that_diverge_are_an_error_and_half_precision_is_fitted_in_single():
    rows = relu_features(80).rows
    with pytest.raises(ValueError, match=r"modules diverged, R = \[10.0\].*smaller lr"):
        fit_rdms(Embeddings(*rows), distortion_weights=(10.0,), **FAST | {"epochs": 3, "lr": 1e30})
    half = Embeddings(rows.features.half(), rows.logits.half(), rows.target)
    modules = RateDistortionModule(16, 4, distortion_weights=(10.0,)).bfloat16()
    fit_rdms(half, modules=modules, **FAST | {"epochs": 1})
    assert {parameter.dtype for parameter in modules.parameters()} == {torch.bfloat16}  # a host's own
    assert np.isfinite(modules.report["rate"][0])


def test_a_state_of_modules_with_another_r_is_refused_and_a_strangers_file_too(tmp_path):
    with pytest.raises(RuntimeError, match=r"the state is of modules with .*1000.0, 500.0.*these have .*\[1.0, 2.0\]"):
        RateDistortionModule(T, C, distortion_weights=(1.0, 2.0)).load_state_dict(fitted().float().state_dict())
    (tmp_path / "text.pt").write_text("not a file of torch")
    with pytest.raises(ValueError, match=r"text.pt must be written by RateDistortionModule\.save"):
        RateDistortionModule.load(tmp_path / "text.pt")
