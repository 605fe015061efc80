"""The numbers to log: the divergence from the scaffolded student as a distribution, and the loss with it."""

import pytest
import reference
import torch
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from disk_plugin import DiSKLoss, GuideHead, functional
from disk_plugin.epoch_report import EpochReport
from disk_plugin.functional import cross_entropy, scaffold
from disk_plugin.variants import VARIANTS

N, C = 32, 20
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_top_k = pytest.mark.parametrize("top_k", [None, 1, 5])


def batch(dtype=torch.float64, positions=()):
    student, teacher = (3 * torch.randn(N, C, *positions, dtype=torch.float64).to(dtype) for _ in range(2))
    guide = torch.linspace(-20, 20, N, dtype=torch.float64).reshape(N, *[1] * len(positions))
    return student, teacher, torch.randint(C, (N, *positions)), guide.expand(N, *positions).to(dtype)


def expected(student, teacher, target, guide, *, variant="paper", top_k=None, tau=4.0):
    """The oracle's divergence per position, from whatever type, in float64."""
    rows = [value.double().movedim(1, -1).reshape(-1, C).tolist() for value in (student, teacher)]
    settings = {"ce_weight": 0.1, "distill_weight": 0.9, "multiplier": 0.0, "budget": 0.0}
    temperatures = {"temperature": tau, "student_temperature": tau}
    inputs = *rows, target.flatten().tolist(), guide.double().flatten().tolist()
    found = reference.disk(*inputs, variant=variant, top_k=top_k, **settings, **temperatures)
    return torch.tensor(found["per_sample"]["divergence"], dtype=torch.float64).reshape(target.shape)


@every_variant
@every_top_k
@pytest.mark.parametrize("positions", [(), (3, 2)], ids=["N", "dense"])
def test_it_is_the_oracles_kl_to_a_distribution_and_never_negative(variant, top_k, positions):
    inputs = batch(positions=positions)
    inputs[2][::5] = -100
    settings = {"variant": variant, "top_k": top_k}
    terms = functional.disk_terms(*inputs, reduction="none", **settings)
    torch.testing.assert_close(terms.divergence, expected(*inputs, **settings), rtol=1e-10, atol=1e-12)
    assert (terms.divergence >= 0).all()
    assert (terms.logged_loss >= 0).all()
    assert not terms.divergence[::5].any()
    assert terms.distill.min() < 0  # what was there to log before
    means = functional.disk_terms(*inputs, **settings)
    for name in ("divergence", "logged_loss"):
        torch.testing.assert_close(getattr(means, name), getattr(terms.mean(), name))
    torch.testing.assert_close(means.logged_loss, 0.1 * means.ce + 0.9 * means.divergence)


@every_top_k
def test_of_a_full_target_it_is_torchs_kl_and_the_scaffolded_term_plus_the_log_of_what_s_and_g_sum_to(top_k):
    student, teacher, target, guide = batch()
    terms = functional.disk_terms(student, teacher, target, guide, top_k=top_k, temperature=2.0, reduction="none")
    g = guide.sigmoid()
    scaffolded = (student / 2).softmax(1) + functional.scaffold_mask(teacher, top_k) * g.unsqueeze(1)
    phi = scaffolded / scaffolded.sum(1, keepdim=True)
    kl = F.kl_div(phi.log(), (teacher / 2).softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(terms.divergence, 4 * kl, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        terms.divergence, terms.distill + 4 * (1 + (top_k or C) * g).log(), rtol=1e-10, atol=1e-9
    )


def test_the_label_that_joins_the_top_k_counts_once_and_only_where_it_was_not_among_them():
    teacher = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 2)
    for label, size in ((0, 1), (3, 2)):
        _, found = scaffold.mask_and_size(teacher, 1, torch.full((2,), label))
        assert found.tolist() == [size, size]
    settings = {"variant": VARIANTS["paper"]._replace(scaffold_label=True), "top_k": 1, "temperature": 1.0}
    for label, size in ((0, 1), (3, 2)):
        target, guide = torch.full((2,), label), torch.zeros(2)
        terms = functional.disk_terms(torch.randn(2, 4), teacher, target, guide, **settings)
        added = terms.divergence - terms.distill
        assert added.item() == pytest.approx(torch.tensor(1 + size / 2).log().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@every_variant
def test_rounding_makes_it_neither_negative_nor_wrong_where_the_student_is_the_teacher(dtype, variant):
    _, teacher, target, guide = batch(dtype)
    student = teacher + 0.05 * torch.randn(N, C).to(dtype)
    found = functional.disk_terms(student, teacher, target, guide, variant=variant, reduction="none").divergence
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    exact = expected(student, teacher, target, guide, variant=variant)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)  # distill itself is down to -50 here


def test_without_a_guide_it_is_plain_distillation_and_with_all_of_it_it_stays_below_the_uniform_students():
    student, teacher, target, _ = batch()
    off, on = (torch.full((N,), logit, dtype=torch.float64) for logit in (-torch.inf, torch.inf))
    terms = functional.disk_terms(student, teacher, target, off)
    torch.testing.assert_close(terms.logged_loss, functional.kd_loss(student, teacher, target))
    torch.testing.assert_close(terms.divergence, terms.distill)
    # g is 1 on all samples after a restart: `loss` falls by about .9 * 16 * log(1 + C)
    opened = functional.disk_terms(student, teacher, target, on, multiplier=0.0)
    uniform = functional.kd_loss(torch.zeros_like(student), teacher, target, ce_weight=0.0, distill_weight=1.0)
    assert opened.loss < terms.loss - 30
    assert 0 <= opened.divergence <= uniform + 16 * torch.tensor(1 + 1 / C).log()


def test_a_target_that_underflows_to_no_mass_at_all_gives_zero():
    # the authors' target: 1000 outside K, where the smallest logit is not divided, and 1000 / 4 inside
    teacher = torch.full((1, 5), 1000.0)
    terms = functional.disk_terms(
        torch.randn(1, 5), teacher, torch.tensor([1]), torch.zeros(1), top_k=1, variant="official_cifar"
    )
    assert 0 <= terms.divergence.item() < 1e-30


def test_nan_in_the_logits_is_not_hidden():
    student, teacher, target, guide = batch()
    student[3, 1] = torch.nan
    terms = functional.disk_terms(student, teacher, target, guide)
    assert terms.divergence.isnan()
    assert terms.logged_loss.isnan()


def test_neither_carries_a_gradient_and_the_sample_weight_is_in_both():
    student, teacher, target, guide = batch()
    student.requires_grad_()
    weight = torch.rand(N, dtype=torch.float64)
    plain, weighted = (
        functional.disk_terms(student, teacher, target, guide, sample_weight=each, reduction="none")
        for each in (None, weight)
    )
    for name in ("divergence", "logged_loss"):
        assert not getattr(plain, name).requires_grad
        torch.testing.assert_close(getattr(weighted, name), weight * getattr(plain, name))


def test_under_vmap_it_is_one_batch_each():
    disk = DiSKLoss(GuideHead(C, hidden_dims=(4,)), top_k=3, variant="official_cifar").double().eval()
    students = torch.randn(3, N, C, dtype=torch.float64)
    _, teacher, target, _ = batch()

    def numbers(student):
        terms = disk.terms(student, teacher, target)
        return torch.stack([terms.divergence, terms.logged_loss])

    torch.testing.assert_close(torch.vmap(numbers)(students), torch.stack([numbers(each) for each in students]))


class _Sizes(TorchFunctionMode):
    """Counts the operations on a tensor of so many elements or more."""

    def __init__(self, least):
        super().__init__()
        self.least, self.count = least, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        self.count += any(value.numel() >= self.least for value in tensors)
        return function(*args, **kwargs or {})


def test_it_costs_no_operation_over_the_classes():
    student, teacher, _, guide = batch()
    plain = {"ce_weight": 0.1, "temperature": 4.0, "student_temperature": 4.0}
    parts = scaffold.scaffold(student, teacher, guide, torch.zeros(N, 2, dtype=torch.int64), None, **plain)
    with _Sizes(4 * N) as seen:
        scaffold.get_divergence(parts, guide.sigmoid(), C)
    assert seen.count == 0
    with _Sizes(4 * N) as control:
        cross_entropy.label_cross_entropy(student.log_softmax(1), torch.zeros(N, dtype=torch.int64))
    assert control.count > 0


def test_the_epochs_report_has_both():
    disk, report = DiSKLoss(GuideHead(C)), EpochReport()
    student, teacher, target, _ = batch(torch.float32)
    target[:4] = -100
    batches = [(student[:8], teacher[:8], target[:8]), (student[8:], teacher[8:], target[8:])]
    for inputs in batches:
        report.add(disk.terms(*inputs, reduction="none"))
    whole = disk.terms(student, teacher, target)
    for name in ("divergence", "logged_loss"):
        assert report.means()[name] == pytest.approx(getattr(whole, name).item(), rel=1e-5)
    assert "feature" not in report.means()
