"""What a host hands over under autocast: half-precision inputs, alone and mixed with float32, at every entry point."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from disk_plugin import DiSKLoss, GuideHead, functional
from disk_plugin.accumulation import AccumulatedBatch
from disk_plugin.cache import TeacherCache
from disk_plugin.diagnostics import SampleRecord
from disk_plugin.epoch_report import EpochReport
from disk_plugin.features.guided import guided_feature_terms
from disk_plugin.features.simkd import SimKD, pooled_classifier
from disk_plugin.replay import GuideReplay
from disk_plugin.taps import with_features

N, C, D = 16, 5, 3
HALVES = (torch.float16, torch.bfloat16)
# of student logits, teacher logits and teacher features
MIXES = [mix for mix in itertools.product((*HALVES, torch.float32), repeat=3) if set(mix) != {torch.float32}]
every_mix = pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(each)[6:] for each in mix))
every_half = pytest.mark.parametrize("dtype", HALVES)


def make_loss(**settings):
    torch.manual_seed(1)
    return DiSKLoss(GuideHead(C, D, hidden_dims=(4,)), **{"budget": 0.05, **settings})


def batch(mix):
    """Inputs in those types, and the same values in float32."""
    student, teacher, features = (torch.randn(N, width).to(dtype) for width, dtype in zip((C, C, D), mix, strict=True))
    narrow = {"student_logits": student, "teacher_logits": teacher, "teacher_features": features}
    narrow["target"] = torch.randint(C, (N,))
    return narrow, {name: value.float() if value.is_floating_point() else value for name, value in narrow.items()}


def outcome(call, inputs, disk):
    """What a call gives, and the gradients of its first output by student and guide."""
    student = inputs["student_logits"].clone().requires_grad_()
    found = call(**inputs | {"student_logits": student})
    gradients = torch.autograd.grad(found[0], (student, *disk.guide.parameters()), allow_unused=True)
    assert gradients[0] is None or gradients[0].dtype == student.dtype
    return [each.detach() for each in found], [None if each is None else each.float() for each in gradients]


def assert_equal_to_float32(make_call, mix):
    narrow, wide = batch(mix)
    results = []
    for inputs in (narrow, wide):
        disk = make_loss()
        results.append(outcome(make_call(disk), inputs, disk))
    assert {value.dtype for value in results[0][0]} == {torch.float32}
    torch.testing.assert_close(results[0][0], results[1][0])
    ours, theirs = (result[1] for result in results)
    torch.testing.assert_close(ours[1:], theirs[1:])
    if ours[0] is not None:  # rounded to the student's own type
        torch.testing.assert_close(ours[0], theirs[0].to(mix[0]).float())


@every_mix
def test_the_loss_of_half_inputs_is_that_of_their_values(mix):
    assert_equal_to_float32(lambda disk: disk.terms, mix)
    assert_equal_to_float32(lambda disk: lambda **inputs: disk.terms(**inputs, reduction="none").mean(), mix)


@every_mix
def test_guided_features_of_half_inputs_are_those_of_their_values(mix):
    def make_call(disk):
        return lambda **inputs: guided_feature_terms(
            disk, **inputs, feature_error=torch.arange(float(N)).to(mix[1]), logit_loss=True
        )[:4]

    assert_equal_to_float32(make_call, mix)


@every_mix
def test_accumulation_of_half_inputs_is_that_of_their_values(mix):
    def make_call(disk):
        def call(**inputs):
            whole = AccumulatedBatch(disk)
            first = {name: value[: N // 2] for name, value in inputs.items()}
            second = {name: value[N // 2 :] for name, value in inputs.items()}
            losses = whole.add(**first), whole.add(**second)
            return [sum(losses), whole.terms().guide_loss]

        return call

    assert_equal_to_float32(make_call, mix)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@every_mix
def test_replay_of_half_inputs_is_that_of_their_values(mix, dtype):
    narrow, wide = batch(mix)
    results = []
    for inputs in (narrow, wide):
        disk = make_loss()
        replay = GuideReplay(disk, torch.optim.SGD(disk.guide.parameters(), lr=0.1), batch_size=4, dtype=dtype)
        loss = replay.student_loss(**inputs)
        results.append([loss, *replay.train_guide(passes=2), *disk.guide.parameters()])
    torch.testing.assert_close(results[0], results[1])


@every_half
def test_replay_keeps_values_that_the_stored_type_cannot_hold(dtype):
    # float16 ends at 65504: log s of a far student and a wide feature lie beyond it, bfloat16's range does not fit it
    inputs = {
        "student_logits": torch.tensor([[0.0, 3e4, 0.0, 0.0, 0.0]]).to(dtype),
        "teacher_logits": torch.randn(1, C).to(dtype),
        "teacher_features": torch.full((1, D), 6e4).to(dtype),
        "target": torch.tensor([0]),
    }
    for stored in (torch.float16, torch.bfloat16, torch.float32):
        disk = make_loss()
        replay = GuideReplay(disk, torch.optim.SGD(disk.guide.parameters(), lr=0.1), dtype=stored)
        replay.record(**inputs)
        found, expected = replay.guide_loss(torch.tensor([0])), disk.terms(**inputs).guide_loss
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


@every_half
def test_simkd_takes_half_maps_and_measures_in_float32(dtype):
    simkd = SimKD(4, 6, pooled_classifier(nn.Linear(6, C)), teacher_size=(2, 2)).to(dtype)
    student_map, teacher_map = torch.randn(N, 4, 2, 2).to(dtype), torch.randn(N, 6, 2, 2)
    for teacher in (teacher_map.to(dtype), teacher_map.to(dtype).float()):
        logits, error = simkd(student_map, teacher)
        assert (logits.dtype, error.dtype) == (dtype, torch.float32)
        projected = simkd.project(student_map).float()
        torch.testing.assert_close(error, (projected - teacher.float()).square().flatten(1).mean(1))
    narrow, _ = batch((dtype, dtype, dtype))
    terms = guided_feature_terms(make_loss(), **narrow | {"student_logits": logits}, feature_error=error)
    terms.loss.backward()
    assert all(p.grad.isfinite().all() for p in simkd.trainable_parameters())


@every_half
def test_simkd_under_autocast_trains_the_projector(dtype):
    simkd = SimKD(4, 6, pooled_classifier(nn.Linear(6, C)), teacher_size=(2, 2))
    with torch.autocast("cpu", dtype):
        logits, error = simkd(torch.randn(N, 4, 2, 2), torch.randn(N, 6, 2, 2).to(dtype))
    assert error.dtype == torch.float32
    assert logits.dtype == dtype
    (error.mean() + logits.float().square().mean()).backward()
    assert all(p.grad.isfinite().all() for p in simkd.trainable_parameters())


@every_half
def test_under_autocast_all_of_disk_is_computed_in_float32(dtype):
    narrow, _ = batch((dtype, dtype, torch.float32))
    results = []
    for enabled in (False, True):
        disk = make_loss()
        replay = GuideReplay(disk, torch.optim.SGD(disk.guide.parameters(), lr=0.1))
        with torch.autocast("cpu", dtype, enabled=enabled):
            terms = disk.terms(**narrow)
            loss = replay.student_loss(**narrow)
            passes = replay.train_guide()
        results.append([*terms, loss, *passes, *disk.guide.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@every_half
def test_an_epoch_report_sums_in_double(dtype):
    narrow, _ = batch((dtype, dtype, dtype))
    narrow["target"][0] = narrow["student_logits"][0].argmax()  # one right, one wrong at least
    narrow["target"][1] = narrow["student_logits"][1].argmin()
    terms = make_loss().terms(**narrow, reduction="none")
    reports = EpochReport(), EpochReport()
    reports[0].add(terms)
    reports[1].add(type(terms)(*(value.to(dtype) for value in terms)))
    assert reports[1].means() == pytest.approx(reports[0].means(), rel=0.05)
    assert reports[1].means()["student_accuracy"] == reports[0].means()["student_accuracy"]


@every_half
def test_a_guide_in_half_precision_trains(dtype):
    disk = make_loss().to(dtype)
    assert disk.multiplier.dtype == torch.float64
    narrow, _ = batch((dtype, dtype, dtype))
    terms = disk.terms(**narrow)
    assert terms.loss.dtype == torch.float32
    terms.loss.backward()
    assert {parameter.grad.dtype for parameter in disk.guide.parameters()} == {dtype}
    assert all(parameter.grad.isfinite().all() for parameter in disk.guide.parameters())


@every_half
def test_fitting_and_optima_of_half_inputs_are_those_of_their_values(dtype):
    narrow, wide = batch((dtype, dtype, dtype))
    students, teachers = (tuple(each[name] for each in (narrow, wide)) for name in ("student_logits", "teacher_logits"))
    found, expected = (functional.fit_student_temperature(s, t) for s, t in zip(students, teachers, strict=True))
    torch.testing.assert_close(found, expected)
    for function, how in (
        (functional.optimal_guide, {"multiplier": 5.0}),
        (functional.optimal_multiplier, {"budget": 0.1}),
    ):
        found, expected = (function(s, t, narrow["target"], **how) for s, t in zip(students, teachers, strict=True))
        torch.testing.assert_close(found, expected)


# ---- the cache and the record ----------------------------------------------------------------------------------------


class InHalf(nn.Module):
    """A teacher that computes in half precision, as under a host's autocast or in a half model."""

    def __init__(self, dtype, *, autocast):
        super().__init__()
        torch.manual_seed(2)
        self.dtype, self.autocast = dtype, autocast
        self.body, self.head = nn.Linear(6, D), nn.Linear(D, C)
        if not autocast:
            self.to(dtype)

    def forward(self, x):
        with torch.autocast("cpu", self.dtype, enabled=self.autocast):
            return self.head(self.body(x if self.autocast else x.to(self.dtype)).relu())


@pytest.mark.parametrize("mode", ["features", "logits", "logits+features"])
@pytest.mark.parametrize("autocast", [False, True], ids=["model", "autocast"])
@every_half
def test_a_half_teachers_outputs_come_back_from_the_cache(tmp_path, dtype, autocast, mode):
    teacher, images = InHalf(dtype, autocast=autocast).eval(), torch.randn(N, 6)
    data = TensorDataset(images, torch.arange(N) % C)
    cache = TeacherCache.write(tmp_path, teacher, data, mode=mode, progress=False)
    logits, features = cache(torch.arange(N), 0)
    with torch.no_grad():
        expected_logits, expected_features = with_features(teacher)(images)
    # float16 holds what both half types give at this size; recomputed logits differ by the teacher's own rounding
    rounding = 4 * torch.finfo(dtype).eps if mode == "features" else 0.0
    torch.testing.assert_close(logits, expected_logits.float(), rtol=rounding, atol=rounding)
    assert logits.dtype == torch.float32
    if features is not None:
        torch.testing.assert_close(features, expected_features.float(), rtol=0, atol=0)
    assert cache.verify(teacher, data, share=1.0) <= 8 * torch.finfo(dtype).eps
    disk = make_loss()
    terms = disk.terms(expected_logits, logits, data.tensors[1], expected_features)
    assert terms.loss.dtype == torch.float32


def test_a_bfloat16_value_that_float16_cannot_hold_is_refused_and_not_stored_as_inf(tmp_path):
    class Huge(nn.Linear):
        def forward(self, x):
            return (super().forward(x) * 0 + 1e5).to(torch.bfloat16)

    teacher = Huge(6, C).eval()
    data = TensorDataset(torch.randn(N, 6), torch.arange(N) % C)
    with pytest.raises(ValueError, match=r"must be finite in float16 \(up to 65504\), got 99840.0 at index 0, view 0"):
        TeacherCache.write(tmp_path, teacher, data, mode="logits", progress=False)


@every_half
def test_a_record_of_half_inputs_is_that_of_their_values(dtype):
    narrow, wide = batch((dtype, dtype, dtype))
    states = []
    for inputs in (narrow, wide):
        record = SampleRecord()
        terms = make_loss().terms(**inputs, reduction="none")
        extra = inputs["teacher_logits"].amax(1)
        record.add(torch.arange(N), 0, terms, target=inputs["target"], largest=extra)
        soft = narrow["teacher_logits"].softmax(1).to(extra.dtype)
        record.add(torch.arange(N), 1, terms, target=soft, largest=extra)
        states.append(record.state_dict())
    assert states[0]["largest"].dtype == torch.float32
    for name, column in states[1].items():
        torch.testing.assert_close(states[0][name], column, msg=name)
