"""Mistakes that change no value and raise nothing: each is warned of, once, and nothing that is right is."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from disk_plugin import DiSKLoss, DualScheduler, GuideHead
from disk_plugin.accumulation import AccumulatedBatch
from disk_plugin.features.guided import guided_feature_terms
from disk_plugin.features.simkd import SimKD, pooled_classifier
from disk_plugin.replay import GuideReplay
from disk_plugin.uniform import UniformGuide

N, C = 8, 5
NOT_TRAINED = r"the guide is not trained: .*epoch 0.* no optimizer holds them; give the optimizer \[\*student"


@pytest.fixture
def quiet():
    """No warning is allowed, whatever the filters are."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def batch():
    return torch.randn(N, C), torch.randn(N, C), torch.randint(C, (N,))


def make(epochs=4, guide=None, **settings):
    disk = DiSKLoss(GuideHead(C, hidden_dims=(4,)) if guide is None else guide, **{"budget": 0.05, **settings})
    return disk, DualScheduler(disk, epochs=epochs, multiplier=(5.0, 5.0)), nn.Linear(C, C)


def epoch(disk, student, optimizer, scaler=None, steps=2, loss=lambda terms: terms.loss):
    """A pass as README's loop makes it."""
    for _ in range(steps):
        x, teacher, target = batch()
        optimizer.zero_grad()
        value = loss(disk.terms(student(x), teacher, target))
        (value if scaler is None else scaler.scale(value)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()


# ---- a guide that is in no optimizer ---------------------------------------------------------------------------------


def test_a_guide_in_no_optimizer_is_told_of_once_with_the_cure():
    disk, dual, student = make()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    epoch(disk, student, optimizer)
    with pytest.warns(UserWarning, match=NOT_TRAINED) as caught:
        dual.step()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epoch(disk, student, optimizer)
        dual.step()


def test_it_is_told_of_under_compile_and_accumulation_too():
    torch.compiler.reset()
    disk, dual, student = make()
    compiled = torch.compile(disk, fullgraph=True, backend="eager")
    x, teacher, target = batch()
    compiled(student(x).detach().requires_grad_(), teacher, target).backward()
    with pytest.warns(UserWarning, match=NOT_TRAINED):
        dual.step()
    disk, dual, student = make()
    whole = AccumulatedBatch(disk)
    for _ in range(2):
        x, teacher, target = batch()
        (whole.add(student(x), teacher, target) / 2).backward()
    whole.terms().guide_loss.backward()
    with pytest.warns(UserWarning, match=NOT_TRAINED):
        dual.step()


def test_an_optimizer_of_a_copy_or_of_the_guide_that_was_replaced_is_none():
    disk, dual, student = make()
    twin = copy.deepcopy(disk)
    before = torch.optim.SGD([*student.parameters(), *twin.parameters()], lr=0.1)
    epoch(disk, student, before)
    with pytest.warns(UserWarning, match=NOT_TRAINED):
        dual.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_guide_that_is_trained_is_not_told_of(kind, foreach, quiet):
    disk, dual, student = make()
    optimizer = kind([*student.parameters(), *disk.parameters()], lr=0.1, foreach=foreach)
    for _ in range(4):
        epoch(disk, student, optimizer)
        dual.step()


def test_an_optimizer_that_writes_past_the_version_counters_is_not_told_of(quiet):
    disk, dual, student = make()
    x, teacher, target = batch()
    for _ in range(2):
        disk(student(x), teacher, target).backward()
        for parameter in disk.parameters():  # no torch.optim.Optimizer, and through .data
            parameter.data -= 0.1 * parameter.grad
        dual.step()


def test_a_frozen_guide_one_without_parameters_and_one_that_is_all_buffers_are_not_told_of(quiet):
    runs = [make(guide=GuideHead(C).requires_grad_(False))]
    for disk in (DiSKLoss(UniformGuide(0.03)), DiSKLoss(UniformGuide(discount=0.4))):
        runs.append((disk, DualScheduler(disk, epochs=4), nn.Linear(C, C)))
    for disk, dual, student in runs:
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for _ in range(2):
            epoch(disk, student, optimizer)
            dual.step()


def test_a_guide_that_was_frozen_after_some_epochs_is_not_told_of(quiet):
    disk, dual, student = make()
    optimizer = torch.optim.SGD([*student.parameters(), *disk.parameters()], lr=0.1)
    epoch(disk, student, optimizer)
    dual.step()
    disk.guide.requires_grad_(False)  # its last gradient still lies there
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    epoch(disk, student, optimizer)
    dual.step()


def test_the_students_turn_of_algorithm_1_is_not_told_of(quiet):
    disk, dual, student = make()
    for_guide, for_student = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (disk, student))
    for turn in range(4):
        if turn % 2:
            epoch(disk, student, for_student, loss=lambda terms: terms.student_loss)
        else:  # zeroed before the backward: the gradient of the last batch stays through the student's turn
            epoch(disk, student, for_guide, loss=lambda terms: terms.guide_loss)
        dual.step()


def test_the_students_turn_is_not_told_of_even_where_the_guides_optimizer_is_made_anew_each_time(quiet):
    disk, dual, student = make()
    epoch(disk, student, torch.optim.SGD(disk.parameters(), lr=0.1), loss=lambda terms: terms.guide_loss)
    dual.step()
    for_student = torch.optim.SGD(student.parameters(), lr=0.1)
    epoch(disk, student, for_student, loss=lambda terms: terms.student_loss)
    dual.step()


def test_a_guide_trained_by_replay_is_not_told_of(quiet):
    disk, dual, student = make()
    replay = GuideReplay(disk, torch.optim.SGD(disk.guide.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(3):
        x, teacher, target = batch()
        optimizer.zero_grad()
        replay.student_loss(student(x), teacher, target).backward()
        optimizer.step()
        dual.step()
        replay.train_guide()


def test_an_epoch_of_which_a_loss_scaler_skipped_every_step_is_not_told_of(quiet):
    disk, dual, student = make()
    optimizer = torch.optim.SGD([*student.parameters(), *disk.parameters()], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # overflows in the student, not in each guide's gradient
    before = copy.deepcopy(disk.guide.state_dict())
    epoch(disk, student, optimizer, scaler, loss=lambda terms: 1e3 * terms.student_loss + 1e-30 * terms.guide_loss)
    assert all(torch.equal(value, before[name]) for name, value in disk.guide.state_dict().items())
    assert all(parameter.grad.isfinite().all() for parameter in disk.parameters())
    assert any(parameter.grad.any() for parameter in disk.parameters())
    dual.step()


def test_a_learning_rate_of_0_is_not_told_of(quiet):
    disk, dual, student = make()
    optimizer = torch.optim.SGD([*student.parameters(), *disk.parameters()], lr=0.0)
    epoch(disk, student, optimizer)
    dual.step()


def test_gradients_that_are_not_finite_say_nothing(quiet):
    disk, dual, student = make()
    x, teacher, target = batch()
    (torch.inf * disk(student(x), teacher, target)).backward()
    dual.step()


def test_a_moving_average_and_a_move_to_another_type_are_not_told_of(quiet):
    disk, dual, student = make()
    disk.double()
    student.double()
    average = AveragedModel(disk)
    optimizer = torch.optim.SGD([*student.parameters(), *disk.parameters()], lr=0.1)
    for _ in range(2):
        x, teacher, target = batch()
        optimizer.zero_grad()
        disk(student(x.double()), teacher.double(), target).backward()
        optimizer.step()
        average.update_parameters(disk)
        dual.step()


# ---- a schedule that is past its end ---------------------------------------------------------------------------------


def test_a_step_per_batch_is_told_of_once_with_both_numbers():
    disk, dual, _ = make(epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            dual.step()
    with pytest.warns(
        UserWarning, match=r"called 4 times, .* epochs=3: call it once per epoch, not once per"
    ) as caught:
        dual.step()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dual.step()
    assert disk.multiplier.item() == 5.0


def test_a_resumed_run_is_told_of_where_its_schedule_is_too_short_and_not_where_it_fits():
    _, dual, _ = make(epochs=3)
    for _ in range(3):
        dual.step()
    for epochs in (3, 6):
        _, resumed, _ = make(epochs=epochs)
        resumed.load_state_dict(dual.state_dict())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resumed.step()
        assert ["called 4 times" in str(each.message) for each in caught] == ([True] if epochs == 3 else [])


# ---- a student that no gradient reaches ------------------------------------------------------------------------------


FROZEN = "the student is not trained: in no batch of epoch 0 do its logits require grad"


def trained_guide(disk, student, loss_of):
    """Two batches of README's loop, which trains the guide at least."""
    optimizer = torch.optim.SGD([*student.parameters(), *disk.parameters()], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(*batch()).backward()
        optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"budget": 0.05}], ids=["discount", "budget"])
@pytest.mark.parametrize("how", ["no_grad", "detached", "parameters"])
def test_a_student_without_gradients_is_told_of_once(settings, how):
    disk, student = DiSKLoss(GuideHead(C), **settings), nn.Linear(C, C).requires_grad_(how != "parameters")
    dual = DualScheduler(disk, epochs=4)

    def loss_of(x, teacher, target):
        with torch.set_grad_enabled(how != "no_grad"):
            logits = student(x)
        return disk(logits.detach() if how == "detached" else logits, teacher, target)

    trained_guide(disk, student, loss_of)
    with pytest.warns(UserWarning, match=FROZEN) as caught:
        dual.step()
    assert [each.filename for each in caught] == [__file__]
    trained_guide(disk, student, loss_of)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dual.step()


def whole_of(disk, student, x, teacher, target):
    whole = AccumulatedBatch(disk)
    return whole.add(student(x), teacher, target) + whole.terms().guide_loss


def in_turns(disk, logits, teacher, target):
    """The guide's turn, its statistics forgotten, and the student's."""
    disk(logits.detach(), teacher, target).backward()
    disk.reset_statistics()
    return disk(logits, teacher, target)


TURNS = {
    "one backward": lambda disk, student, x, *others: disk(student(x), *others),
    "the guide's turn": lambda disk, student, x, *others: disk.terms(student(x).detach(), *others).guide_loss,
    "micro-batches": whole_of,
    "the guide's turn, by the loss": lambda disk, student, x, *others: in_turns(disk, student(x), *others),
    "one of two": lambda disk, student, x, *others: disk(student(x), *others) + disk(student(x).detach(), *others),
}


@pytest.mark.parametrize("loss_of", TURNS.values(), ids=TURNS)
def test_a_student_with_gradients_and_the_guides_turn_are_not_told_of(loss_of, quiet):
    disk, dual, student = make()
    trained_guide(disk, student, lambda *inputs: loss_of(disk, student, *inputs))
    dual.step()


# ---- batches on which nothing is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("guide", [GuideHead(C), UniformGuide(discount="auto")], ids=["guide", "uniform"])
def test_a_validation_loss_without_gradients_changes_nothing(guide):
    disk = DiSKLoss(guide, student_temperature="fit")
    student, (x, teacher, target) = nn.Linear(C, C), batch()
    disk(student(x), teacher, target)
    before = {name: value.clone() for name, value in disk.named_buffers()}
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            validated = disk(student(x), teacher, target)
    torch.testing.assert_close(dict(disk.named_buffers()), before, rtol=0, atol=0)
    torch.testing.assert_close(validated, disk.eval()(student(x), teacher, target).detach())


# ---- settings that do nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"weight": torch.ones(C)}, "weight"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"weight": torch.ones(C), "label_smoothing": 0.1}, "weight and label_smoothing"),
    ],
)
def test_settings_of_a_cross_entropy_that_has_no_weight_are_told_of(given, named):
    with pytest.warns(UserWarning, match=f"^{named} would change the cross-entropy alone, whose weight is 0") as caught:
        DiSKLoss(GuideHead(C), **given)
    assert [each.filename for each in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiSKLoss(GuideHead(C), ce_weight=0.1, **given)
        DiSKLoss(GuideHead(C), label_smoothing=0.0)


@pytest.mark.parametrize("multiplier", [0.0, 20.0])
def test_a_multiplier_that_the_schedule_overwrites_is_told_of(multiplier):
    with pytest.warns(UserWarning, match=f"given multiplier={multiplier:g}, which the schedule's bounds"):
        DualScheduler(DiSKLoss(GuideHead(C), multiplier=multiplier, budget=0.1), epochs=8, period=4)


def test_a_multiplier_that_stays_or_was_not_given_is_not_told_of(quiet):
    DualScheduler(DiSKLoss(GuideHead(C), multiplier=0.0, budget=0.1), epochs=8)
    DualScheduler(DiSKLoss(GuideHead(C)), epochs=8, period=4)
    DualScheduler(DiSKLoss(GuideHead(C), budget=0.1), epochs=8, period=4)


# ---- a loss that was loaded without its scheduler --------------------------------------------------------------------


def halfway(guide):
    disk = DiSKLoss(copy.deepcopy(guide))
    dual = DualScheduler(disk, epochs=4)
    for _ in range(2):
        dual.step()
    return disk.state_dict(), dual.state_dict()


every_guide = pytest.mark.parametrize(
    "guide", [GuideHead(C), UniformGuide(discount="auto"), UniformGuide((1.0, 0.0))], ids=["guide", "uniform", "ramp"]
)


@every_guide
@pytest.mark.parametrize("loss_first", [True, False])
def test_a_loss_loaded_without_its_scheduler_is_told_of_once(guide, loss_first):
    state, _ = halfway(guide)
    disk = DiSKLoss(copy.deepcopy(guide))
    dual = None if loss_first else DualScheduler(disk, epochs=4)
    disk.load_state_dict(state)
    dual = dual or DualScheduler(disk, epochs=4)
    with pytest.warns(UserWarning, match="comes from training progress 0.5, and its DualScheduler goes on from 0"):
        dual.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dual.step()


@every_guide
def test_a_loss_set_back_to_its_beginning_or_with_finer_progress_is_not_told_of(guide, quiet):
    disk = DiSKLoss(copy.deepcopy(guide))
    initial = copy.deepcopy(disk.state_dict())
    DualScheduler(disk, epochs=4).step()
    dual = DualScheduler(disk, epochs=4)
    disk.load_state_dict(initial)
    (disk.level or disk.guide).set_progress(0.1)
    dual.step()


@every_guide
def test_a_new_run_after_the_end_of_another_is_not_told_of(guide, quiet):
    disk = DiSKLoss(copy.deepcopy(guide))
    for _ in range(2):
        dual = DualScheduler(disk, epochs=3)
        for _ in range(3):
            dual.step()


@every_guide
@pytest.mark.parametrize("epochs", [4, 8, 2])
@pytest.mark.parametrize("order", ["loss, schedule", "schedule, loss", "loss, then the schedule is made"])
def test_a_whole_checkpoint_is_not_told_of(guide, epochs, order):
    state, dual_state = halfway(guide)
    disk = DiSKLoss(copy.deepcopy(guide))
    if order.endswith("made"):
        disk.load_state_dict(state)
    dual = DualScheduler(disk, epochs=epochs)
    if order == "loss, schedule":
        disk.load_state_dict(state)
    dual.load_state_dict(dual_state)
    if order == "schedule, loss":
        disk.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", r"step\(\) was called")
        dual.step()


# ---- student and teacher swapped -------------------------------------------------------------------------------------


SWAPPED = "teacher_logits requires grad and student_logits does not: are they swapped"


def from_terms(disk, student, teacher, target):
    return disk.terms(student, teacher, target).loss


def from_replay(disk, student, teacher, target):
    replay = GuideReplay(disk, torch.optim.SGD(disk.guide.parameters(), lr=0.1))
    return replay.student_loss(student, teacher, target)


def from_accumulation(disk, student, teacher, target):
    return AccumulatedBatch(disk).add(student, teacher, target)


def from_features(disk, student, teacher, target):
    return guided_feature_terms(disk, student, teacher, target, None, student.square().mean(1)).loss


CALLS = [lambda disk, *inputs: disk(*inputs), from_terms, from_replay, from_accumulation, from_features]
every_call = pytest.mark.parametrize("call", CALLS, ids=["forward", "terms", "replay", "accumulation", "features"])


@every_call
def test_swapped_logits_are_told_of_once_at_the_users_line(call):
    disk, _, student = make()
    x, frozen, target = batch()
    with pytest.warns(UserWarning, match=SWAPPED) as caught:
        call(disk, frozen, student(x), target)
    assert [each.filename for each in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(disk, frozen, student(x), target)


@every_call
def test_logits_in_order_are_not_told_of(call, quiet):
    disk, _, student = make()
    x, frozen, target = batch()
    call(disk, student(x), frozen, target)
    call(disk, student(x), nn.Linear(C, C)(x), target)  # a teacher outside no_grad: wasteful, and in order
    call(disk, student(x).detach(), frozen, target)  # the guide's turn


@every_call
def test_nothing_is_told_in_evaluation_or_without_gradients(call, quiet):
    disk, _, student = make()
    x, frozen, target = batch()
    with torch.no_grad():
        call(disk, frozen, student(x).requires_grad_(), target)
    disk.eval()
    call(disk, frozen, student(x), target)


def test_swapped_maps_are_told_of_too():
    simkd = SimKD(4, 4, pooled_classifier(nn.Linear(4, C)), teacher_size=(2, 2))
    own, frozen = torch.randn(N, 4, 2, 2, requires_grad=True), torch.randn(N, 4, 2, 2)
    with pytest.warns(UserWarning, match="teacher_map requires grad and student_map does not") as caught:
        simkd(frozen, own)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simkd(own, frozen)
        simkd.eval()(frozen, own)


def test_neither_compile_nor_a_transform_minds_swapped_logits(quiet):
    torch.compiler.reset()
    disk, _, student = make()
    x, frozen, target = batch()
    own = student(x).detach().requires_grad_()
    torch.compile(disk, fullgraph=True, backend="eager")(frozen, own, target)
    found = torch.func.grad(lambda logits: disk(logits, own, target))(frozen)
    assert found.abs().sum() > 0
    torch.vmap(lambda logits: disk(logits, own, target))(frozen.expand(2, N, C))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("student", "teacher"), [(True, False), (False, True), (True, True)])
def test_probabilities_in_place_of_logits_are_told_once(student, teacher, dtype):
    disk = DiSKLoss(GuideHead(C))
    given = [
        (value.softmax(1) if soft else value).to(dtype)
        for soft, value in zip((student, teacher), 3 * torch.randn(2, 8, C), strict=True)
    ]
    names = [name for name, soft in (("student_logits", student), ("teacher_logits", teacher)) if soft]
    target = torch.arange(8) % C
    given[0].requires_grad_()
    with pytest.warns(UserWarning, match=f"{' and '.join(names)} must be logits, got rows of positive numbers") as told:
        disk(*given, target)
    disk(*given, target)
    assert len(told) == 1
    assert told[0].filename == __file__


def test_logits_that_might_be_taken_for_probabilities_are_not():
    for logits in (torch.eye(C), torch.randn(C, C).log_softmax(1), torch.full((2, C), 0.3), torch.zeros(0, C)):
        disk = DiSKLoss(GuideHead(C))
        disk(logits, logits, torch.arange(len(logits)) % C)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "settings", [{"discount": "auto"}, {"discount": 0.3}, {"budget": 0.1, "student_temperature": "fit"}]
)
def test_a_loss_inside_a_checkpoint_is_refused_where_its_state_moves(settings, reentrant):
    """What it would recompute has the level of the next batch: a gradient of another loss."""
    disk, (student, teacher, target) = DiSKLoss(GuideHead(C), **settings), batch()
    loss = checkpoint(disk, student.requires_grad_(), teacher, target, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=r"evaluated within a backward.*call the loss outside the checkpoint"):
        loss.backward()
    checkpoint(disk.eval(), student, teacher, target, use_reentrant=False).backward()


def test_a_loss_with_a_budget_may_be_inside_a_checkpoint():
    disk, (student, teacher, target) = DiSKLoss(GuideHead(C), budget=0.1), batch()
    student.requires_grad_()
    expected = torch.autograd.grad(disk(student, teacher, target), [student, *disk.parameters()])
    loss = checkpoint(disk, student, teacher, target, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, [student, *disk.parameters()]), expected)


def test_a_scheduler_that_is_never_stepped_is_told_of_once(monkeypatch):
    monkeypatch.setattr("disk_plugin._watch._UNSTEPPED", 5)
    disk = DiSKLoss(GuideHead(C))
    dual = DualScheduler(disk, epochs=3)
    batch = torch.randn(4, C), torch.randn(4, C), torch.arange(4) % C
    for _ in range(2):
        for _ in range(4):
            disk(*batch)
        dual.step()
    for _ in range(4):
        disk(*batch)
    message = r"5 training batches since DualScheduler was made or stepped: call dual.step\(\)"
    with pytest.warns(UserWarning, match=message):
        disk(*batch)
    for _ in range(12):
        disk(*batch)
    constant = DiSKLoss(GuideHead(C), discount=0.3)
    DualScheduler(constant, epochs=3)
    for _ in range(12):
        constant(*batch)
