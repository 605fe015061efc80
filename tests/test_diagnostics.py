"""What is recorded of each sample, what files, figures and scores make of it."""

import importlib
import inspect
import io
import re
import subprocess
import sys

import matplotlib.colors
import numpy as np
import pandas
import PIL.Image
import pytest
import torch
from pandas.testing import assert_frame_equal
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy, one_hot

from disk_plugin import DiSKLoss, GuideHead, diagnostics
from disk_plugin.diagnostics import (
    SampleRecord,
    detection_auroc,
    gallery,
    plot_against_ce,
    plot_over_epochs,
    plot_per_class,
    read,
)
from disk_plugin.features.guided import guided_feature_terms
from disk_plugin.functional import DiSKTerms

INDEX = torch.tensor([7, 2, 5])
TARGET = torch.tensor([1, 0, 2])
QUANTITIES = ("guide", "discount", "ce", "correct")
DTYPES = {
    "index": "int64",
    "epoch": "int32",
    "target": "int32",
    "guide": "float32",
    "discount": "float32",
    "ce": "float32",
    "correct": "bool",
}
FIGURES = {
    "over epochs": plot_over_epochs,
    "against CE": plot_against_ce,
    "per class": plot_per_class,
    "gallery": lambda table: gallery(table, torch.rand(9, 4, 4)),
}


# ---- helpers ---------------------------------------------------------------------------------------------------------


def made(guide=(0.5, 0.25, 1.0), discount=(0.75, 0.5, 0.0), ce=(0.5, 2.0, 0.125), correct=(1.0, 0.0, 1.0), **options):
    """Terms with these values; what is not recorded is NaN, so that it would show."""
    values = {
        name: torch.tensor(value, **options)
        for name, value in zip(QUANTITIES, (guide, discount, ce, correct), strict=True)
    }
    unread = torch.full_like(values["guide"], torch.nan)
    return DiSKTerms(**{name: values.get(name, unread) for name in DiSKTerms._fields})


def random_terms(*shape):
    return made(*torch.rand(3, *shape).tolist(), torch.randint(2, shape).float().tolist())


def table_of(**columns):
    """A table as a record gives it; epoch 0 and a right answer where nothing else is said."""
    columns = {"index": range(len(columns["guide"])), "epoch": 0, "discount": 0.5, "ce": 1.0, "correct": True} | columns
    ordered = [*(name for name in DTYPES if name in columns), *(name for name in columns if name not in DTYPES)]
    known = {name: DTYPES[name] for name in ordered if name in DTYPES}
    return pandas.DataFrame({name: columns[name] for name in ordered}).astype(known)


def refuses(error, *parts):
    """Expect an error whose message has the parts, literally and in this order."""
    return pytest.raises(error, match=".*".join(re.escape(part) for part in parts))


def run_python(code, **options):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, **options).stdout


def drawn(line):
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def line_of(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return drawn(line)


# ---- what is recorded ------------------------------------------------------------------------------------------------


def test_a_value_or_type_of_the_table_is_not_what_was_added():
    record = SampleRecord()
    record.add(INDEX, 0, made(), target=TARGET, teacher_ce=torch.tensor([3.0, 4.0, 5.0]))
    record.add(torch.tensor([2]), 3, made([0.0], [1.0], [9.0], [0.0]), target=TARGET[1:2], teacher_ce=torch.zeros(1))
    expected = table_of(
        index=[7, 2, 5, 2],
        epoch=[0, 0, 0, 3],
        target=[1, 0, 2, 0],
        guide=[0.5, 0.25, 1.0, 0.0],
        discount=[0.75, 0.5, 0.0, 1.0],
        ce=[0.5, 2.0, 0.125, 9.0],
        correct=[True, False, True, False],
        teacher_ce=np.float32([3.0, 4.0, 5.0, 0.0]),
    )
    assert_frame_equal(record.table(), expected, check_exact=True)


def test_a_table_without_target_has_other_columns():
    record = SampleRecord()
    assert_frame_equal(record.table(), table_of(guide=[]))  # nothing recorded: no rows, the same types
    record.add(INDEX, 0, made())
    assert list(record.table()) == [name for name in DTYPES if name != "target"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_a_training_records_is_not_what_its_tensors_say(dtype):
    disk, weight, x = DiSKLoss(GuideHead(4)), torch.randn(6, 4, requires_grad=True), torch.randn(20, 6)
    teacher_logits, target = torch.randn(20, 4).to(dtype), torch.randint(4, (20,))
    record, record_of_wrapped, index = SampleRecord(), SampleRecord(), torch.randperm(20)
    for part in index.split(8):
        # under autocast the student's logits come in bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = (x[part] @ weight).to(dtype)
            arguments = logits, teacher_logits[part], target[part], None, torch.ones(len(part))
            wrapped = guided_feature_terms(disk, *arguments, reduction="none")
            extra = cross_entropy(logits, target[part], reduction="none")
            record.add(part, 0, wrapped.disk, target=target[part], own_ce=extra)
            record_of_wrapped.add(part, 0, wrapped, target=target[part], own_ce=extra)
    table = record.table()
    assert_frame_equal(record_of_wrapped.table(), table)
    assert table.dtypes.astype(str).to_dict() == DTYPES | {"own_ce": "float32"}
    assert table["index"].tolist() == index.tolist()
    assert table["target"].tolist() == target[index].tolist()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = (x[index] @ weight).to(dtype).detach()
    assert table["correct"].tolist() == (logits.argmax(1) == target[index]).tolist()
    exact = cross_entropy(logits.double(), target[index], reduction="none")
    torch.testing.assert_close(torch.tensor(table["ce"]).double(), exact, rtol=1e-5, atol=1e-5)
    assert table["guide"].between(0, 1).all()
    assert table["guide"].nunique() > 1


def test_the_record_changes_with_the_tensors_it_was_given():
    terms, index, target, extra = made(), INDEX.clone(), TARGET.clone(), torch.ones(3)
    record = SampleRecord()
    record.add(index, 0, terms, target=target, extra=extra)
    for tensor in (*terms, index, target, extra):
        tensor.fill_(77)
    table = record.table()
    assert table["index"].tolist() == [7, 2, 5]
    assert not (table == 77).any(axis=None)
    state = record.state_dict()
    state["guide"].fill_(77)
    table.loc[0, "ce"] = 77
    assert not (record.table() == 77).any(axis=None)


def test_the_record_keeps_a_graph_alive():
    leaf = torch.ones(3, requires_grad=True)
    terms = made()._replace(ce=leaf * 2, guide=leaf / 2)
    record = SampleRecord()
    record.add(INDEX, 0, terms, extra=leaf * 3)
    assert not any(column.requires_grad for batch in record._batches for column in batch.values())
    assert record.table()["extra"].tolist() == [3, 3, 3]


def test_adding_a_batch_waits_for_the_device():
    """A meta tensor has no values: whatever reads one fails, as moving an epoch's rows to the CPU does."""
    record, on_meta = SampleRecord(), {"device": "meta"}
    for _ in range(2):
        target = torch.zeros(3, dtype=torch.int64, **on_meta)
        record.add(INDEX, 0, made(**on_meta), target=target, extra=torch.ones(3, **on_meta))
        record.add(INDEX, 0, made(**on_meta), target=torch.ones(3, 4, **on_meta), extra=target.bfloat16())
    assert {column.device.type for column in record._batches[0].values()} == {"cpu", "meta"}
    with pytest.raises(NotImplementedError, match="meta"):
        record.add(INDEX, 1, made(**on_meta), target=target, extra=target.float())
    with pytest.raises(NotImplementedError, match="meta"):
        record.state_dict()


def test_an_epoch_stays_on_the_device_when_the_next_begins():
    record = SampleRecord()
    for epoch in (0, 0, 1):
        record.add(INDEX, epoch, made())
    assert [len(record._parts), len(record._batches)] == [1, 1]


def test_reading_in_between_changes_the_record():
    read_often, read_once = SampleRecord(), SampleRecord()
    for epoch in range(3):
        for _ in range(2):
            terms, index = random_terms(4), torch.randint(9, (4,))
            read_often.add(index, epoch, terms)
            read_once.add(index, epoch, terms)
            read_often.state_dict()
            read_often.table()
    assert len(read_once.table()) == 24
    assert_frame_equal(read_often.table(), read_once.table())


def test_extras_lose_their_kind():
    extras = {
        "half": torch.tensor([0.5, 1.0, 2.0], dtype=torch.bfloat16),
        "double": torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64),
        "flag": torch.tensor([True, False, True]),
        "small": torch.tensor([1, 2, 3], dtype=torch.int8),
    }
    record = SampleRecord()
    record.add(INDEX, 0, made(), **extras)
    table = record.table()[list(extras)]
    assert table.dtypes.astype(str).to_dict() == dict(zip(extras, ("float32", "float32", "bool", "int64"), strict=True))
    assert table["double"].tolist() == np.float32([0.1, 1.0, 2.0]).tolist()
    assert table["flag"].tolist() == [True, False, True]


@pytest.mark.parametrize("ignore_index", [-100, 255])
def test_ignored_positions_are_recorded_as_zeros(ignore_index):
    target = torch.tensor([1, ignore_index, 0, ignore_index])
    disk = DiSKLoss(GuideHead(3), ignore_index=ignore_index)
    terms = disk.terms(torch.randn(4, 3), torch.randn(4, 3), target, reduction="none")
    record, without_target = SampleRecord(ignore_index=ignore_index), SampleRecord()
    record.add(torch.arange(4), 0, terms, target=target)
    without_target.add(torch.arange(4), 0, terms)
    assert record.table()["index"].tolist() == [0, 2]
    assert (record.table()["ce"] > 0).all()
    assert without_target.table()["ce"][[1, 3]].tolist() == [0, 0]  # as documented: nothing tells them apart


def test_a_batch_of_ignored_positions_alone_breaks_the_record():
    record = SampleRecord()
    record.add(INDEX, 0, made(), target=torch.full((3,), -100))
    assert len(record.table()) == 0
    record.add(INDEX, 1, made(), target=TARGET)
    assert record.table()["target"].tolist() == [1, 0, 2]


def test_dense_terms_lose_track_of_their_sample_or_position():
    disk, target = DiSKLoss(GuideHead(3)), torch.randint(3, (2, 4, 5))
    target[1, 2, 3] = -100
    terms = disk.terms(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), target, reduction="none")
    per_sample, per_position = SampleRecord(), SampleRecord()
    positions = torch.arange(40).view(2, 4, 5)
    per_sample.add(torch.tensor([8, 6]), 0, terms, target=target, area=torch.tensor([1.0, 2.0]))
    per_position.add(positions, 0, terms, target=target, area=positions.float())
    valid = (target != -100).flatten()
    assert per_sample.table()["index"].tolist() == [8] * 20 + [6] * 19
    assert per_sample.table()["area"].tolist() == [1.0] * 20 + [2.0] * 19
    assert per_position.table()["index"].tolist() == positions.flatten()[valid].tolist()
    for name in QUANTITIES:
        expected = getattr(terms, name).flatten()[valid].tolist()
        assert per_sample.table()[name].tolist() == per_position.table()[name].tolist() == expected
    assert per_sample.table()["target"].tolist() == target.flatten()[valid].tolist()


def test_probability_targets_are_not_recorded_as_their_argmax():
    record, dense = SampleRecord(), SampleRecord()
    record.add(INDEX, 0, made(), target=torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.4, 0.1], [0.0, 0.0, 1.0]]))
    assert record.table()["target"].tolist() == [1, 0, 2]
    target = torch.randint(3, (2, 4))
    dense.add(torch.arange(2), 0, random_terms(2, 4), target=one_hot(target, 3).float().movedim(-1, 1))
    assert dense.table()["target"].tolist() == target.flatten().tolist()


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@HALVES
@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
def test_half_terms_are_recorded_with_other_values(dtype, mixed):
    """Batches in half precision, or those in turns with float32: the same columns, each value as it came."""
    record, expected = SampleRecord(), []
    for each in range(4):
        own = torch.float32 if mixed and each % 2 else dtype
        terms = random_terms(5)
        terms = terms._replace(**{name: getattr(terms, name).to(own) for name in QUANTITIES})
        soft = torch.rand(5, 3).to(own)
        record.add(torch.arange(5), each, terms, target=soft, extra=(300 * terms.ce).to(own))
        expected.append((terms, soft.argmax(1), (300 * terms.ce).to(own)))
    table = record.table()
    assert table.dtypes.astype(str).to_dict() == DTYPES | {"extra": "float32"}
    for name in QUANTITIES:
        column = torch.cat([getattr(terms, name).double() for terms, _, _ in expected])
        assert table[name].astype("float64").tolist() == column.tolist()
    assert table["target"].tolist() == torch.cat([target for _, target, _ in expected]).tolist()
    assert table["extra"].tolist() == torch.cat([extra.float() for _, _, extra in expected]).tolist()


@HALVES
def test_a_bfloat16_beyond_float16_is_lost_and_an_infinity_hidden(dtype):
    largest = torch.finfo(dtype).max
    record = SampleRecord()
    record.add(INDEX, 0, made(ce=(largest, torch.inf, 1e-5), dtype=dtype), extra=torch.tensor([largest, -largest, 0.0]))
    table = record.table()
    assert table["ce"].tolist() == [largest, np.inf, torch.tensor(1e-5, dtype=dtype).item()]
    assert table["extra"].tolist() == [largest, -largest, 0]


@HALVES
@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
def test_guided_features_in_half_are_recorded_unlike_the_same_values_in_float32(dtype, mixed):
    disk, target = DiSKLoss(GuideHead(4, 3)), torch.randint(4, (12,))
    inputs = [torch.randn(12, 4), torch.randn(12, 4), target, torch.randn(12, 3), torch.rand(12)]
    narrow = [value.to(dtype) if value.is_floating_point() else value for value in inputs]
    wide = [value.float() if value.is_floating_point() else value for value in narrow]
    if mixed:  # what autocast leaves: student's logits half, the teacher's whole, and the other way round
        narrow[1], narrow[4] = wide[1], wide[4]
    states = []
    for values in (narrow, wide):
        with torch.autocast("cpu", dtype):
            terms = guided_feature_terms(disk, *values, reduction="none")
        record = SampleRecord()
        record.add(torch.arange(12), 0, terms, target=target, feature=values[4])
        states.append(record.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-6)
    assert states[0]["feature"].dtype == torch.float32
    assert len(states[0]["guide"].unique()) > 1


# ---- state -----------------------------------------------------------------------------------------------------------


def test_a_resumed_training_records_something_else():
    batches = [(torch.randint(50, (5,)), epoch, random_terms(5)) for epoch in range(4) for _ in range(3)]
    whole, first, second = SampleRecord(), SampleRecord(), SampleRecord()
    for index, epoch, terms in batches:
        whole.add(index, epoch, terms, target=index % 7, flag=index > 9)
    for index, epoch, terms in batches[:7]:  # the checkpoint falls into the middle of an epoch
        first.add(index, epoch, terms, target=index % 7, flag=index > 9)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.add(INDEX, 0, made())  # dropped on loading
    second.load_state_dict(torch.load(file, weights_only=True))
    for index, epoch, terms in batches[7:]:
        second.add(index, epoch, terms, target=index % 7, flag=index > 9)
    assert_frame_equal(second.table(), whole.table())
    torch.testing.assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_state_changes_with_later_batches_or_shares_memory():
    record, other = SampleRecord(), SampleRecord()
    record.add(INDEX, 0, made())
    state = record.state_dict()
    record.add(INDEX, 1, made())
    assert {len(column) for column in state.values()} == {3}
    other.load_state_dict(state)
    state["index"].fill_(77)
    assert other.table()["index"].tolist() == record.table()["index"].tolist()[:3] == [7, 2, 5]


def test_the_state_of_an_empty_record_is_refused_or_sets_columns():
    record = SampleRecord()
    assert record.state_dict() == {}
    record.load_state_dict({})
    record.add(INDEX, 0, made(), target=TARGET)
    assert len(record.table()) == 3
    record.load_state_dict({})
    assert len(record.table()) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("ce"), "'correct': (3,)}"),
        (lambda state: state.update(ce=torch.ones(2)), "'ce': (2,)"),
        (lambda state: state.update(extra=torch.ones(3, 1)), "'extra': (3, 1)"),
        (lambda state: state.update(extra=[1.0, 2.0, 3.0]), "'extra': [1.0, 2.0, 3.0]"),
    ],
    ids=["missing", "length", "shape", "list"],
)
def test_another_state_passed(change, message):
    record = SampleRecord()
    record.add(INDEX, 0, made())
    state, before = record.state_dict(), record.table()
    change(state)
    expected = "expected a state with ['index', 'epoch', 'guide', 'discount', 'ce', 'correct'], tensors (rows,) of one"
    with refuses(RuntimeError, expected, "length, got {'index': (3,)", message):
        record.load_state_dict(state)
    assert_frame_equal(record.table(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_state_in_another_precision_breaks_the_record_or_its_table(dtype):
    record, again = SampleRecord(), SampleRecord()
    record.add(INDEX, 0, made(), target=TARGET, extra=torch.ones(3), flag=TARGET > 1)
    narrow = {name: each.to(dtype) if each.is_floating_point() else each for name, each in record.state_dict().items()}
    again.load_state_dict(narrow)
    assert_frame_equal(again.table(), record.table(), check_exact=True)  # the values of made() are dyadic
    for each in (record, again):
        each.add(INDEX, 1, made(), target=TARGET, extra=torch.ones(3), flag=TARGET > 1)
    assert_frame_equal(again.table(), record.table(), check_exact=True)


@pytest.mark.parametrize("name", ["index", "epoch", "target", "correct"])
def test_whole_numbers_that_were_rounded_to_half_passed(name):
    record, other = SampleRecord(), SampleRecord()
    record.add(INDEX + 2049, 0, made(), target=TARGET)  # 2051 is no float16
    state = record.state_dict()
    state[name] = state[name].half()
    other.add(INDEX, 5, made())
    before = other.table()
    with refuses(RuntimeError, f"expected {name} as torch.", "got torch.float16, which may have rounded it"):
        other.load_state_dict(state)
    assert_frame_equal(other.table(), before)


# ---- refused batches -------------------------------------------------------------------------------------------------

BATCH = {"index": INDEX, "epoch": 1, "terms": made(), "target": TARGET, "extra": torch.ones(3)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"index": [7, 2, 5]}, TypeError, "index must be a Tensor, got list"),
        ({"index": INDEX.int()}, TypeError, "index must be int64, got torch.int32"),
        ({"index": INDEX.float()}, TypeError, "index must be int64, got torch.float32"),
        ({"index": INDEX[:2]}, ValueError, "index must have shape (3,), got (2,)"),
        ({"index": INDEX[:, None]}, ValueError, "index must have shape (3,), got (3, 1)"),
        (
            {"terms": random_terms(3, 2), "index": torch.ones(2, 3).long()},
            ValueError,
            "shape (3,) or (3, 2), got (2, 3)",
        ),
        ({"epoch": -1}, ValueError, "epoch must be >= 0, got -1"),
        ({"epoch": 1.0}, TypeError, "epoch must be an int, got float 1.0"),
        (
            {"terms": made(0.5, 0.5, 0.5, 1.0)},
            ValueError,
            'terms must be evaluated with reduction="none" ... got scalars',
        ),
        ({"terms": tuple(made())}, TypeError, "terms must be DiSKTerms or GuidedTerms, got tuple"),
        ({"terms": torch.ones(3)}, TypeError, "terms must be DiSKTerms or GuidedTerms, got Tensor"),
        ({"target": [1, 0, 2]}, TypeError, "target must be a Tensor, got list"),
        ({"target": TARGET.int()}, TypeError, "target must be int64, got torch.int32"),
        ({"target": TARGET.float()}, TypeError, "torch.float32 of shape (3,): call target.long() if these are class"),
        ({"target": TARGET[:2]}, ValueError, "target must have shape (3,), got (2,)"),
        ({"target": torch.ones(2, 3)}, ValueError, "target must have shape (3,), got (2,)"),
        ({"extra": 1.0}, TypeError, "extra must be a Tensor, got float"),
        ({"extra": torch.ones(3, dtype=torch.complex64)}, TypeError, "extra must be real, got torch.complex64"),
        ({"extra": torch.ones(())}, ValueError, "extra must have shape (3,), got ()"),
        ({"extra": torch.ones(3, 1)}, ValueError, "extra must have shape (3,), got (3, 1)"),
        ({"guide": torch.ones(3)}, ValueError, "extras must not have the name of a column ['index', ... got 'guide'"),
        ({"target": None}, ValueError, "must bring the columns of the first {'index' ... 'target' ... got {"),
        (
            {"another": torch.ones(3)},
            ValueError,
            "must bring the columns of the first ... got ... 'another': torch.float32",
        ),
        ({"extra": torch.ones(3).long()}, ValueError, "'extra': torch.float32}, got ... 'extra': torch.int64}"),
    ],
)
@pytest.mark.parametrize("epoch_before", [0, 1])
def test_a_bad_batch_passed(changed, error, message, epoch_before):
    record = SampleRecord()
    record.add(**BATCH | {"epoch": epoch_before})
    with refuses(error, *message.split(" ... ")):
        record.add(**BATCH | changed)
    assert len(record.table()) == 3
    record.add(**BATCH)
    assert len(record.table()) == 6


@pytest.mark.parametrize("value", [255.0, True, None])
def test_an_ignore_index_that_is_no_int_passed(value):
    with refuses(TypeError, "ignore_index must be an int, got", repr(value)):
        SampleRecord(ignore_index=value)


# ---- files -----------------------------------------------------------------------------------------------------------


def awkward_record():
    """All float32 there are, NaN, infinities and denormals among them, and large integers."""
    record, bits = SampleRecord(), torch.randint(-(2**31), 2**31, (4, 2000)).int()
    ce = bits.view(torch.float32)[3]
    ce[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-45])
    terms = made(*bits.view(torch.float32)[:2].tolist(), ce.tolist(), (bits[2] > 0).float().tolist())
    index = torch.arange(2000) + 2**40
    record.add(index, 2**30, terms, target=index % 1000, whole=ce * 0 + 1, flag=bits[2] > 5, count=bits[0] + 2**33)
    return record


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize("as_path", [str, lambda path: path], ids=["str", "Path"])
def test_a_file_gives_back_another_table(tmp_path, suffix, as_path):
    record = awkward_record()
    record.write(as_path(tmp_path / f"samples{suffix}"))
    again = read(as_path(tmp_path / f"samples{suffix}"))
    extras = {"whole": "float32", "flag": "bool", "count": "int64"}
    assert again.dtypes.astype(str).to_dict() == DTYPES | extras
    assert again["ce"].isna().any()
    assert_frame_equal(again, record.table(), check_exact=True)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_file_without_rows_or_target_gives_back_another_table(tmp_path, suffix):
    record = SampleRecord()
    record.write(tmp_path / f"empty{suffix}")
    assert_frame_equal(read(tmp_path / f"empty{suffix}"), record.table())
    record.add(INDEX, 0, made())
    record.write(tmp_path / f"three{suffix}")
    assert_frame_equal(read(tmp_path / f"three{suffix}"), record.table())


@pytest.mark.parametrize("name", ["samples", "samples.json", "samples.CSV", "samples.csv.gz"])
def test_a_file_of_another_kind_passed(tmp_path, name):
    for call in (SampleRecord().write, read):
        with refuses(ValueError, "path must end in .parquet or .csv, got", f"{name}'"):
            call(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_other_columns_passed(tmp_path):
    other = pandas.DataFrame({"index": [0], "loss": [1.0]})
    other.to_csv(tmp_path / "other.csv", index=False)
    other.to_parquet(tmp_path / "other.parquet")
    for path in tmp_path.iterdir():
        with refuses(ValueError, "must have the columns ['index', 'epoch', 'guide',", "got ['index', 'loss']"):
            read(path)


# ---- finding bad labels ----------------------------------------------------------------------------------------------


def test_the_score_is_not_the_share_of_pairs_in_order():
    # flipped: sample 1 and 3. guide: of the pairs (1,0) (1,2) (3,0) (3,2) one is in order, one tied: 1.5 / 4
    table = table_of(
        guide=[0.4, 0.6, 0.8, 0.4],
        discount=[0.1, 0.9, 0.2, 0.8],
        ce=[3.0, 2.0, 4.0, 1.0],
        correct=[True, False, False, False],
        teacher_ce=[1.0, 1.0, 1.0, 1.0],
    )
    assert detection_auroc(table, torch.tensor([False, True, False, True, True])) == {
        "guide": 1.5 / 4,
        "1 - guide": 2.5 / 4,
        "discount": 1.0,
        "ce": 0.0,
        "1 - correct": 3 / 4,  # samples 1 and 3 before 0 for certain, tied with 2
        "teacher_ce": 0.5,
    }


@pytest.mark.parametrize("levels", [2, 8, 1024])  # dyadic values, so that sums are exact and ties are ties
@pytest.mark.parametrize("epoch", [None, 1])
def test_the_score_is_not_scikit_learns(levels, epoch):
    generator = np.random.default_rng(levels)
    index = np.tile(generator.permutation(500)[:300], 3)  # 300 of 500 samples, in three epochs
    draw = [generator.integers(0, levels, 900) / levels for _ in range(4)]
    table = table_of(
        index=index,
        epoch=np.repeat([0, 1, 2], 300),
        guide=draw[0],
        discount=draw[1],
        ce=draw[2],
        correct=generator.random(900) < 0.5,
        extra=draw[3],
    )
    flipped = generator.random(500) < 0.2
    scores = detection_auroc(table, torch.from_numpy(flipped), epoch=epoch)
    rows = table if epoch is None else table[table["epoch"] == epoch]
    expected = {}
    for name in (*QUANTITIES, "extra"):
        means = np.array([rows[name][rows["index"] == i].astype("float64").mean() for i in np.unique(index)])
        expected[name] = roc_auc_score(flipped[np.unique(index)], means)
    expected["1 - guide"], expected["1 - correct"] = 1 - expected["guide"], 1 - expected.pop("correct")
    assert scores == pytest.approx(expected, rel=1e-12)
    assert len(scores) == 6


def test_a_tiny_guide_is_tied_in_its_complement():
    scores = detection_auroc(table_of(guide=[1e-20, 1e-30]), torch.tensor([False, True]))
    assert (scores["guide"], scores["1 - guide"]) == (0.0, 1.0)


def test_means_are_rounded_into_ties():
    above = float(np.nextafter(np.float32(0.5), np.float32(1)))  # the mean with 0.5 is no float32
    table = table_of(index=[0, 1, 0, 1], epoch=[0, 0, 1, 1], guide=[0.5, 0.5, 0.5, above])
    assert detection_auroc(table, torch.tensor([False, True]))["guide"] == 1


def test_nan_is_hidden_or_spoils_the_other_scores():
    table = table_of(
        index=[0, 1, 2, 0, 1, 2],
        epoch=[0, 0, 0, 1, 1, 1],
        guide=[0.1, 0.9, 0.2, 0.1, 0.9, 0.2],
        ce=[1.0, np.nan, 0.5, 1.0, np.inf, 0.5],
    )
    flipped = torch.tensor([False, True, False])
    scores = detection_auroc(table, flipped)
    assert np.isnan(scores["ce"])
    assert scores["guide"] == 1
    assert detection_auroc(table.dropna(), flipped)["ce"] == 1  # infinity ranks on top


def test_columns_of_text_break_the_score():
    table = table_of(guide=[0.1, 0.9]).assign(method="DiSK")
    assert "method" not in detection_auroc(table, torch.tensor([False, True]))


@pytest.mark.parametrize(
    ("flipped", "error", "message"),
    [
        (
            torch.zeros(9, dtype=torch.bool),
            ValueError,
            "True for some recorded samples and False for others, got all False",
        ),
        (torch.ones(9, dtype=torch.bool), ValueError, "for others, got all True"),
        # only a sample that was not recorded is flipped
        (torch.arange(9) == 8, ValueError, "for others, got all False"),
        (torch.arange(7) == 2, ValueError, "flipped must have shape (N,) with N >= 8, got (7,)"),
        ((torch.arange(9) == 2)[:, None], ValueError, "flipped must have shape (N,) with N >= 8, got (9, 1)"),
        (torch.arange(9), TypeError, "flipped must be a bool Tensor, got torch.int64"),
        ([True] * 9, TypeError, "flipped must be a bool Tensor, got list"),
    ],
)
def test_bad_flags_passed(flipped, error, message):
    with refuses(error, message):
        detection_auroc(table_of(index=[7, 2, 5], guide=[0.1, 0.2, 0.3]), flipped)


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_the_epochs_are_drawn_with_other_values():
    table = table_of(
        index=[0, 1, 2] * 2,
        epoch=[3, 3, 3, 5, 5, 5],
        guide=[0.25, 0.5, 0.75, 0.0, 0.5, 1.0],
        discount=[0.5, 0.5, 0.125, 1.0, 1.0, 0.25],
        correct=[True, True, False, True, True, True],
    )
    guide, discount = plot_over_epochs(table).axes
    assert line_of(guide, "all, mean") == ([3, 5], [0.5, 0.5])
    assert line_of(guide, "right, mean") == ([3, 5], [0.375, 0.5])
    assert line_of(guide, "wrong, mean") == ([3], [0.75])  # no sample was wrong in epoch 5
    assert line_of(discount, "all, mean") == ([3, 5], [0.375, 0.75])
    assert line_of(discount, "right, mean") == ([3, 5], [0.5, 0.75])
    (band,) = guide.collections
    corners = {(x, round(y, 6)) for x, y in band.get_paths()[0].vertices.tolist()}
    assert corners == {(3, 0.3), (3, 0.7), (5, 0.1), (5, 0.9)}  # tenth and ninetieth percentile, interpolated
    assert [axes.get_xlabel() for axes in (guide, discount)] == ["epoch", "epoch"]
    assert [axes.get_ylabel() for axes in (guide, discount)] == ["guide g", "discount"]


def ce_table():
    return table_of(
        index=[4, 1, 4, 1, 2],
        epoch=[0, 0, 1, 1, 1],
        guide=[0.5, 0.25, 1.0, 0.75, 0.125],
        discount=[0.0, 0.5, 0.5, 0.5, 0.25],
        ce=[4.0, 1.0, 2.0, 0.5, 8.0],
        correct=[False, True, False, False, True],
    )


@pytest.mark.parametrize(
    ("epoch", "right", "wrong", "title"),
    [
        (0, {(1.0, 0.25)}, {(4.0, 0.5)}, "epoch 0"),
        (1, {(8.0, 0.125)}, {(2.0, 1.0), (0.5, 0.75)}, "epoch 1"),
        # sample 4: (4 + 2) / 2 and (.5 + 1) / 2, never right; sample 1: .75, .5, right in one of two
        (None, {(0.75, 0.5), (8.0, 0.125)}, {(3.0, 0.75)}, "mean over epochs 0 to 1"),
    ],
)
def test_samples_are_drawn_at_another_ce(epoch, right, wrong, title):
    figure = plot_against_ce(ce_table(), epoch=epoch)
    axes = figure.axes[0]
    points = {each.get_label(): {tuple(point) for point in each.get_offsets().tolist()} for each in axes.collections}
    assert points == {"right": right, "wrong": wrong}
    assert line_of(axes, "mean") == tuple(list(each) for each in zip(*sorted(right | wrong), strict=True))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("cross-entropy (nats)", "guide g")
    assert figure.axes[1].get_ylabel() == "discount"
    assert figure.get_suptitle() == title


def test_the_line_is_not_the_mean_of_twenty_equal_groups():
    ce = np.random.default_rng(0).permutation(200) / 32
    axes = plot_against_ce(table_of(guide=ce / 8, ce=ce)).axes[0]
    groups = np.sort(ce).reshape(20, 10).mean(1)
    assert line_of(axes, "mean") == (groups.tolist(), (groups / 8).tolist())


@pytest.mark.parametrize("names", [None, ["cat", "dog", "owl"], {0: "cat", 1: "dog", 2: "owl"}])
def test_a_class_is_drawn_with_other_means(names):
    table = table_of(
        index=[0, 1, 2, 3, 0],
        epoch=[0, 0, 0, 0, 1],
        target=[2, 0, 2, 1, 2],
        guide=[0.5, 0.25, 1.0, 0.0, 0.0],
        discount=[1.0, 0.125, 0.5, 0.25, 0.0],
    )
    figure = plot_per_class(table, epoch=0, names=names)
    guide, discount = figure.axes
    assert [bar.get_height() for bar in discount.patches] == [0.125, 0.25, 0.75]  # classes 0, 1, 2
    assert [bar.get_height() for bar in guide.patches] == [0.25, 0.0, 0.75]
    ticks = [label.get_text() for label in discount.get_xticklabels()]
    assert ticks == (["0", "1", "2"] if names is None else ["cat", "dog", "owl"])
    assert [guide.get_ylabel(), discount.get_ylabel(), discount.get_xlabel()] == [
        "guide g, mean",
        "discount, mean",
        "class",
    ]
    assert figure.get_suptitle() == "epoch 0"
    every = [bar.get_height() for bar in plot_per_class(table, names=names).axes[0].patches]
    assert every == [0.25, 0.0, 0.5]


def test_many_classes_are_drawn_out_of_order():
    discount = np.random.default_rng(0).permutation(300) / 512
    axes = plot_per_class(table_of(guide=discount, discount=discount, target=range(300))).axes[1]
    assert [bar.get_height() for bar in axes.patches] == sorted(discount.tolist())
    assert axes.get_xlabel() == "class, by rank of its discount"


def test_a_class_without_a_name_passed():
    for names in (["cat", "dog"], {0: "cat", 1: "dog"}):
        table = table_of(guide=[0.5], target=[2])
        with refuses(ValueError, "names must have one for class 2, got 2 names"):
            plot_per_class(table, names=names)
        with refuses(ValueError, "names must have one for class 2, got 2 names"):
            gallery(table, torch.rand(1, 2, 2), names=names)
    with refuses(ValueError, "names must have one for class -1, got 2 names"):
        plot_per_class(table_of(guide=[0.5], target=[-1]), names=["cat", "dog"])


def gallery_table():
    """Mean discount of samples 0, 1, 2, 3: .125, .75, .5, .625; in epoch 1 sample 0 leads."""
    return table_of(
        index=[0, 1, 2, 3, 0],
        epoch=[0, 0, 0, 0, 1],
        target=[1, 0, 1, 0, 1],
        guide=[0.5] * 5,
        discount=[0.0, 0.75, 0.5, 0.625, 0.25],
        correct=[True, False, True, True, False],
    )


def shown(figure):
    """Titles and pixels of the panels that hold an image."""
    panels = [axes for axes in figure.axes if axes.images]
    return [axes.get_title() for axes in panels], [np.asarray(axes.images[0].get_array()) for axes in panels]


@pytest.mark.parametrize("shape", [(6, 4, 4), (6, 1, 4, 4), (6, 3, 4, 4)])
def test_the_gallery_shows_other_images_or_another_order(shape):
    images = torch.rand(shape)
    figure = gallery(gallery_table(), images, count=3, names=["cat", "dog"])
    titles, pixels = shown(figure)
    assert titles == ["cat\n0.75", "cat\n0.62", "dog\n0.50"]
    for i, pixel in zip((1, 3, 2), pixels, strict=True):
        expected = images[i].movedim(0, -1) if len(shape) == 4 and shape[1] == 3 else images[i].squeeze()
        assert np.array_equal(pixel, expected.numpy())
    colors = [axes.title.get_color() for axes in figure.axes[:3]]
    assert colors == ["red", "black", "black"]
    assert len(figure.axes) == 4  # a square of panels, the last one empty
    assert not any(axes.axison for axes in figure.axes)
    assert figure.get_suptitle() == "largest discount, mean over epochs 0 to 1"


def test_the_gallery_goes_by_another_epoch_or_count():
    images = torch.rand(4, 4, 4)
    assert shown(gallery(gallery_table(), images))[0] == ["0\n0.75", "0\n0.62", "1\n0.50", "1\n0.12"]
    assert shown(gallery(gallery_table(), images, epoch=1))[0] == ["1\n0.25"]
    assert shown(gallery(gallery_table().drop(columns="target"), images, count=1))[0] == ["0.75"]


class Pairs:
    """A data set of (image, label), as torchvision's."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        assert type(i) is int
        return self.images[i], 0


def test_an_image_is_shown_with_other_brightness():
    raw = torch.randint(256, (4, 3, 5, 5), dtype=torch.uint8)
    for images in (raw, Pairs(raw)):
        assert np.allclose(shown(gallery(gallery_table(), images, count=1))[1][0], raw[1].movedim(0, -1) / 255)
    normalized = torch.randn(4, 1, 5, 5, requires_grad=True)
    (pixels,) = shown(gallery(gallery_table(), normalized.bfloat16(), count=1))[1]
    assert (pixels.min(), pixels.max()) == (0, 1)
    figure = gallery(gallery_table(), torch.full((4, 5, 5), 0.5), count=1)
    assert figure.axes[0].images[0].get_clim() == (0, 1)  # gray, not stretched to black or white
    assert shown(gallery(gallery_table(), torch.full((4, 5, 5), 9.0), count=1))[1][0].tolist() == [[0.0] * 5] * 5
    pillow = [PIL.Image.fromarray(image.movedim(0, -1).numpy()) for image in raw]
    assert np.array_equal(shown(gallery(gallery_table(), pillow, count=1))[1][0], raw[1].movedim(0, -1))


@HALVES
@pytest.mark.parametrize("shape", [(4, 5, 5), (4, 3, 5, 5)])
def test_half_images_are_shown_with_other_values(dtype, shape):
    images = torch.rand(shape).to(dtype)
    for given in (images, Pairs(images), list(images)):
        (pixels,) = shown(gallery(gallery_table(), given, count=1))[1]
        expected = images[1].float().movedim(0, -1) if len(shape) == 4 else images[1].float()
        assert np.array_equal(pixels, expected.numpy())
    wide = images * 4 - 2
    (pixels,) = shown(gallery(gallery_table(), wide, count=1))[1]
    expected = wide[1].float()
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    assert np.allclose(pixels, expected.movedim(0, -1) if len(shape) == 4 else expected)


def narrow(table):
    return table.astype(dict.fromkeys(["guide", "discount", "ce"], "float16"))


def test_a_table_in_float16_is_drawn_or_scored_otherwise():
    """Values that float16 holds, of which sums do not fit."""
    table = table_of(
        index=[0, 1, 2] * 2,
        epoch=[3, 3, 3, 5, 5, 5],
        target=[0, 1, 1] * 2,
        guide=[0.25, 0.5, 0.75, 0.0, 0.5, 1.0],
        discount=[0.5, 0.5, 0.125, 1.0, 1.0, 0.25],
        ce=[60000.0, 50016.0, 40000.0, 30000.0, 60000.0, 8.0],
        correct=[True, True, False, True, True, False],
    )
    for draw in (plot_over_epochs, plot_against_ce, plot_per_class):
        figures = [draw(each) for each in (table, narrow(table))]
        lines = [[drawn(line) for axes in figure.axes for line in axes.lines] for figure in figures]
        bars = [[bar.get_height() for axes in figure.axes for bar in axes.patches] for figure in figures]
        assert lines[0] == lines[1]
        assert bars[0] == bars[1]
        assert lines[0] or bars[0]
    assert line_of(plot_over_epochs(narrow(table)).axes[0], "all, mean") == ([3, 5], [0.5, 0.5])
    flipped = torch.tensor([False, True, False])
    assert detection_auroc(narrow(table), flipped) == detection_auroc(table, flipped)
    images = torch.rand(3, 4, 4)
    assert shown(gallery(narrow(table), images))[0] == shown(gallery(table, images))[0]


def test_a_file_in_float16_is_read_in_another_type(tmp_path):
    table = table_of(guide=[0.5, 0.25])
    narrow(table).to_parquet(tmp_path / "narrow.parquet")
    assert_frame_equal(read(tmp_path / "narrow.parquet"), table)


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (torch.rand(3, 4, 4), {}, ValueError, "images must hold every recorded sample, at least 4, got 3"),
        (torch.rand(4, 2, 4, 4), {}, ValueError, "shape (H, W), (1, H, W) or (3, H, W), got (2, 4, 4)"),
        (torch.rand(4, 5), {}, ValueError, "shape (H, W), (1, H, W) or (3, H, W), got (5,)"),
        (torch.rand(4, 4, 4), {"count": 0}, ValueError, "count must be >= 1, got 0"),
        (torch.rand(4, 4, 4), {"count": 4.0}, TypeError, "count must be an int, got float 4.0"),
    ],
)
def test_a_bad_gallery_passed(images, options, error, message):
    with refuses(error, message):
        gallery(gallery_table(), images, **options)


def test_a_negative_index_counts_from_the_end():
    table = table_of(index=[-1, 0], guide=[0.5, 0.5])
    with refuses(ValueError, "index must be >= 0, got -1"):
        gallery(table, torch.rand(4, 4, 4))
    with refuses(ValueError, "index must be >= 0, got -1"):
        detection_auroc(table, torch.tensor([True, False]))


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_cannot_be_drawn(name, tmp_path):
    figure = FIGURES[name](gallery_table())
    for suffix in ("png", "pdf"):
        figure.savefig(tmp_path / f"figure.{suffix}", dpi=40)
    pixels = np.asarray(PIL.Image.open(tmp_path / "figure.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
    assert all(matplotlib.colors.is_color_like(text.get_color()) for text in figure.texts)


READERS = FIGURES | {"score": lambda table: detection_auroc(table, torch.arange(9) > 1)}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ({"guide": [0.5]}, TypeError, "table must be a pandas.DataFrame, got dict"),
        (SampleRecord(), TypeError, "table must be a pandas.DataFrame, got SampleRecord"),
        (
            gallery_table().drop(columns=["ce", "correct"]),
            ValueError,
            "must have the columns ['index', ... got ['index',",
        ),
        (gallery_table()[:0], ValueError, "table must hold at least one row, got none"),
    ],
    ids=["dict", "record", "columns", "rows"],
)
def test_a_bad_table_passed(name, table, error, message):
    with refuses(error, *message.split(" ... ")):
        READERS[name](table)


@pytest.mark.parametrize(
    ("epoch", "error", "message"),
    [
        (2, ValueError, "epoch must be one of the recorded [0, 1], got 2"),
        (-1, ValueError, "epoch must be >= 0, got -1"),
        (0.0, TypeError, "epoch must be an int, got float 0.0"),
    ],
)
def test_an_epoch_that_was_not_recorded_passed(epoch, error, message):
    table = gallery_table()
    for call in (
        lambda: plot_against_ce(table, epoch=epoch),
        lambda: plot_per_class(table, epoch=epoch),
        lambda: gallery(table, torch.rand(4, 4, 4), epoch=epoch),
        lambda: detection_auroc(table, torch.arange(4) > 1, epoch=epoch),
    ):
        with refuses(error, message):
            call()


def test_classes_were_asked_for_without_a_target():
    message = "'correct', 'target'], got ['index',", "record.add(..., target=target) records the target"
    with refuses(ValueError, *message):
        plot_per_class(gallery_table().drop(columns="target"))


# ---- what is imported ------------------------------------------------------------------------------------------------


def test_importing_or_recording_loads_an_extra(tmp_path):
    code = (
        "import sys, torch; before = set(sys.modules); import disk_plugin.diagnostics as d; "
        "from disk_plugin.functional import DiSKTerms; record = d.SampleRecord(); "
        "record.add(torch.arange(2), 0, DiSKTerms(*[torch.ones(2)] * len(DiSKTerms._fields))); "
        "d.SampleRecord().load_state_dict(record.state_dict()); "
        "print(({'matplotlib', 'pandas', 'pyarrow', 'sklearn'} & set(sys.modules)) - before)"
    )
    assert run_python(code, cwd=tmp_path).strip() == "set()"


def test_a_figure_needs_a_display_or_pyplot(tmp_path):
    code = (
        "import sys, torch, disk_plugin.diagnostics as d; from disk_plugin.functional import DiSKTerms; "
        "r = d.SampleRecord(); terms = DiSKTerms(*[torch.ones(2)] * len(DiSKTerms._fields)); "
        "r.add(torch.arange(2), 0, terms, target=torch.arange(2)); "
        "t = r.table(); f = [d.plot_over_epochs(t), d.plot_against_ce(t), d.plot_per_class(t), "
        "d.gallery(t, torch.rand(2, 4, 4))]; [x.savefig('f.png') for x in f]; print('matplotlib.pyplot' in sys.modules)"
    )
    assert run_python(code, cwd=tmp_path).strip() == "False"


def without(monkeypatch, missing):
    """Let the import of a module and of what it holds fail."""
    for name in [missing, *(name for name in sys.modules if name.startswith(f"{missing}."))]:
        monkeypatch.setitem(sys.modules, name, None)


TABLE = gallery_table()
CALLS = {
    "table": lambda path: SampleRecord().table(),
    "write csv": lambda path: SampleRecord().write(path / "new.csv"),
    "write parquet": lambda path: SampleRecord().write(path / "new.parquet"),
    "read csv": lambda path: read(path / "old.csv"),
    "read parquet": lambda path: read(path / "old.parquet"),
} | {name: lambda path, reader=reader: reader(TABLE) for name, reader in READERS.items()}
NEEDED = {
    "pandas": set(CALLS),
    "pyarrow": {"write parquet", "read parquet"},
    "matplotlib": set(FIGURES),
}


@pytest.mark.parametrize("missing", NEEDED)
@pytest.mark.parametrize("call", CALLS)
def test_a_missing_extra_is_not_named(missing, call, tmp_path, monkeypatch):
    for suffix in ("csv", "parquet"):
        SampleRecord().write(tmp_path / f"old.{suffix}")
    without(monkeypatch, missing)
    if call not in NEEDED[missing]:
        CALLS[call](tmp_path)
        return
    message = f"needs {missing}, which cannot be imported here: pip install 'disk-plugin[plots]'"
    with refuses(ImportError, message) as caught:
        CALLS[call](tmp_path)
    assert isinstance(caught.value.__cause__, ImportError)
    assert missing in str(caught.value.__cause__)


# ---- documentation ---------------------------------------------------------------------------------------------------


def test_the_package_exposes_its_documented_names():
    assert all(hasattr(diagnostics, name) and getattr(diagnostics, name).__doc__ for name in diagnostics.__all__)
    assert importlib.import_module("disk_plugin.diagnostics") is diagnostics


FUNCTIONS = [getattr(diagnostics, name) for name in diagnostics.__all__ if name.islower()]


@pytest.mark.parametrize("documented", [SampleRecord, SampleRecord.add, *FUNCTIONS])
def test_docstring_names_the_arguments_of_the_signature(documented):
    block = re.search(r"Args:\n(.*?)\n\n", inspect.getdoc(documented) + "\n\n", re.DOTALL).group(1)
    named = re.findall(r"^    (?:\*\*)?(\w+):", block, re.MULTILINE)
    assert named == [name for name in inspect.signature(documented).parameters if name != "self"]
