import copy
import inspect
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from disk_plugin import DiSKLoss, GuideHead
from disk_plugin.cache import SeededViews, TeacherCache, checksums
from disk_plugin.taps import with_features

SAMPLES, VIEWS, WIDTH, CLASSES, BATCH = 10, 3, 8, 5, 4
ROWS = SAMPLES * VIEWS
MODES = ["features", "logits", "logits+features"]


class Transform:
    """Draws from the named generators; its repr, like any plain object's, holds an address."""

    def __init__(self, generators=("torch", "numpy", "random"), scale=0.5):
        self.generators, self.scale = generators, scale

    def __call__(self, image):
        draws = {"torch": lambda: torch.rand(()).item(), "numpy": np.random.rand, "random": random.random}
        noise = [self.scale * draws[name]() if name in self.generators else 0.0 for name in draws]
        return image + torch.tensor(noise).repeat(4)


class Images(Dataset):
    """Images (12,) that a transform shifts, per position mod 3 by one generator each."""

    def __init__(self, transform=None, samples=SAMPLES):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(samples, 12, generator=generator)
        self.targets = torch.randint(CLASSES, (samples,), generator=generator)
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return image if self.transform is None else self.transform(image), int(self.targets[index])


class Returning(Images):
    """Gives whatever ``item(index)`` gives."""

    def __init__(self, item):
        super().__init__()
        self.item = item

    def __getitem__(self, index):
        return self.item(index)


class Counting(nn.Module):
    """Counts the samples that pass."""

    seen = 0

    def forward(self, x):
        self.seen += len(x)
        return x


def make_teacher(head=True):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        layers = [Counting(), nn.Linear(12, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.5)]
        return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES) if head else nn.Identity())


def seeded_views(**settings):
    return SeededViews(Images(Transform()), VIEWS, **settings)


def write(folder, teacher=None, views=None, **settings):
    teacher = make_teacher() if teacher is None else teacher
    settings = {"batch_size": BATCH, "progress": False} | settings
    return TeacherCache.write(folder, teacher, seeded_views() if views is None else views, **settings)


def online(teacher, views, index, view):
    """The teacher's own outputs of one sample-view, without any of the cache's code."""
    with torch.no_grad():
        features = teacher.eval()[:5](views.item(index, view)[0][None])
        return teacher[5](features)[0], features[0]


def everything():
    index, view = torch.arange(SAMPLES).repeat(VIEWS), torch.arange(VIEWS).repeat_interleave(SAMPLES)
    shuffled = torch.randperm(ROWS)
    return index[shuffled], view[shuffled]


def generator_states():
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), kind, keys.tolist(), rest, random.getstate()


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text())


def flip(path, place, bits=0x40):
    """Damage one byte and leave the size."""
    content = bytearray(path.read_bytes())
    content[place] ^= bits
    path.write_bytes(content)


def as_written_before_checksums(folder):
    """Make of a cache what the format before would hold."""
    names = ["mode", "layer", "num_classes", "feature_dim", "samples", "views", "head_bytes", "fingerprint", "written"]
    entries = {name: meta_of(folder)[name] for name in names} | {"format": 1}
    (folder / "meta.json").write_text(json.dumps(entries, indent=1) + "\n")
    (folder / "checksums.bin").unlink(missing_ok=True)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 3 rows (more where rows are shorter), so that there are many and the batches do not end with them."""
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 3 * 2 * WIDTH)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupt(folder, batches, **settings):
    """Write that many batches and fail."""

    class Failing(Counting):
        def forward(self, x):
            if len(x) > 1 and self.seen > batches * BATCH:
                raise KeyboardInterrupt
            return super().forward(x)

    teacher = make_teacher()
    teacher[0] = Failing()
    with pytest.raises(KeyboardInterrupt):
        write(folder, teacher, **settings)
    assert meta_of(folder)["written"] == batches * BATCH


# ---- SeededViews -----------------------------------------------------------------------------------------------------


def test_item_is_the_data_sets_with_its_place_appended():
    plain = SeededViews(Images(), VIEWS)
    image, target, index, view = plain.item(4, 2)
    assert torch.equal(image, Images()[4][0])
    assert (target, index, view) == (Images()[4][1], 4, 2)
    assert len(plain) == SAMPLES


def test_views_are_the_same_whatever_was_drawn_and_read_before():
    views = seeded_views()
    first = [views.item(index, view)[0] for index in range(SAMPLES) for view in range(VIEWS)]
    torch.rand(3), random.seed(5), np.random.seed(5)  # noqa: NPY002
    again = {(i, v): seeded_views().item(i, v)[0] for v in reversed(range(VIEWS)) for i in reversed(range(SAMPLES))}
    assert all(torch.equal(one, again[divmod(place, VIEWS)]) for place, one in enumerate(first))


@pytest.mark.parametrize("generator", ["torch", "numpy", "random"])
def test_each_generator_draws_anew_for_every_sample_view_and_seed(generator):
    column = ["torch", "numpy", "random"].index(generator)
    base, drawn = Images().images, set()
    for seed in (0, 1):
        views = SeededViews(Images(Transform((generator,))), VIEWS, seed=seed)
        drawn |= {(views.item(i, v)[0] - base[i])[column].item() for i in range(SAMPLES) for v in range(VIEWS)}
    assert len(drawn) == 2 * ROWS  # a sum of seed, index and view would repeat itself
    assert 0.1 < torch.tensor(list(drawn)).mean() < 0.4  # of U(0, 0.5)


@pytest.mark.parametrize("raises", [False, True])
def test_generators_are_as_before_also_when_the_data_set_raises(raises):
    def item(index):
        torch.rand(2), random.random(), np.random.rand()  # noqa: NPY002
        if raises:
            raise OSError("unreadable")
        return torch.zeros(1), 0

    views, before = SeededViews(Returning(item), 2), generator_states()
    if raises:
        with pytest.raises(OSError, match="unreadable"):
            views[0]
    else:
        views[0]
    assert generator_states() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_give_the_view_of_the_epoch_also_in_workers_that_live_on(workers):
    views = seeded_views()
    loader = DataLoader(views, batch_size=4, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    for epoch in (0, 1, VIEWS + 2):
        views.set_epoch(epoch)
        seen = set()
        for images, _, index, view in loader:
            assert (view == epoch % VIEWS).all()
            for image, place in zip(images, index.tolist(), strict=True):
                assert torch.equal(image, seeded_views().item(place, epoch % VIEWS)[0])
            seen |= set(index.tolist())
        assert seen == set(range(SAMPLES))


def test_views_are_pure_without_numpy(monkeypatch):
    expected = SeededViews(Images(Transform(("torch", "random"))), VIEWS).item(3, 1)[0]
    monkeypatch.setitem(sys.modules, "numpy.random", None)  # importing it fails
    views, before = SeededViews(Images(Transform(("torch", "random"))), VIEWS), random.getstate()
    assert torch.equal(views.item(3, 1)[0], expected)
    assert random.getstate() == before


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SeededViews(Stream(), 2), TypeError, "dataset must be map-style, with a length, got Stream"),
        (lambda: SeededViews(Images(samples=0), 2), ValueError, "at least one sample, got none"),
        (lambda: SeededViews(Images(), 0), ValueError, "views must be >= 1, got 0"),
        (lambda: SeededViews(Images(), 2.0), TypeError, "views must be an int, got float"),
        (lambda: SeededViews(Images(), 2, seed=0.5), TypeError, "seed must be an int, got float"),
        (lambda: SeededViews(Images(), 2).set_epoch(-1), ValueError, "epoch must be >= 0, got -1"),
        (lambda: SeededViews(Images(), 2)[SAMPLES], IndexError, r"index must be in \[0, 10\), got 10"),
        (lambda: SeededViews(Images(), 2)[-1], IndexError, r"index must be in \[0, 10\), got -1"),
        (lambda: SeededViews(Images(), 2).item(0, 2), IndexError, r"view must be in \[0, 2\), got 2"),
        (lambda: SeededViews(Returning(lambda i: {"image": i}), 2)[0], TypeError, "must be tuples .* got dict"),
        (lambda: SeededViews(Returning(torch.zeros), 2)[0], TypeError, "must be tuples .* got Tensor"),
    ],
)
def test_seeded_views_refuse_what_they_cannot_do(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- what is read is what the teacher gives --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_cached_outputs_are_the_teachers_up_to_float16(tmp_path, mode):
    teacher, views = make_teacher(), seeded_views()
    cache = write(tmp_path, teacher, views, mode=mode)
    index, view = everything()
    logits, features = cache(index, view)
    expected = [online(teacher, views, i, v) for i, v in zip(index.tolist(), view.tolist(), strict=True)]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, torch.stack([one for one, _ in expected]), rtol=2e-3, atol=1e-3)
    assert len(logits.unique(dim=0)) == ROWS
    assert (cache.num_classes, cache.samples, cache.views) == (CLASSES, SAMPLES, VIEWS)
    if mode == "logits":
        assert features is None
        assert cache.feature_dim == 0
    else:
        expected_features = torch.stack([other for _, other in expected])
        torch.testing.assert_close(features, expected_features, rtol=2**-10, atol=1e-6)
        assert cache.feature_dim == WIDTH


def test_features_recompute_the_logits_in_float32_by_the_teachers_own_last_layer(tmp_path):
    teacher = make_teacher()
    index, view = everything()
    logits, features = write(tmp_path, teacher)(index, view)
    weight, bias = teacher[5].weight.detach().double(), teacher[5].bias.detach().double()
    torch.testing.assert_close(logits.double(), features.double() @ weight.T + bias, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(TeacherCache(tmp_path)(index, view)[0], logits)


def test_a_single_place_and_a_view_for_all_are_read_alike(tmp_path):
    cache = write(tmp_path)
    logits, features = cache(torch.tensor([3, 1]), 2)
    one_logits, one_features = cache(3, 2)
    torch.testing.assert_close(one_logits, logits[0])
    assert torch.equal(one_features, features[0])
    assert torch.equal(cache(torch.tensor([3, 1]), torch.tensor([2, 2]))[0], logits)
    assert cache(torch.tensor([], dtype=torch.int64), 0)[0].shape == (0, CLASSES)


@pytest.mark.parametrize("mode", ["features", "logits+features"])
def test_disk_trained_from_the_cache_has_the_loss_and_gradients_of_the_teacher_online(tmp_path, mode):
    teacher, views = make_teacher(), seeded_views()
    cache = write(tmp_path, teacher, views, mode=mode)
    disk, student = DiSKLoss(GuideHead(CLASSES, cache.feature_dim), budget=0.3), nn.Linear(12, CLASSES)
    views.set_epoch(1)
    x, target, index, view = next(iter(DataLoader(views, batch_size=SAMPLES, shuffle=True)))
    found = []
    for outputs in (cache(index, view), with_features(teacher.eval())(x)):
        for module in (disk, student):
            module.zero_grad()
        loss = disk(student(x), outputs[0].detach(), target, outputs[1].detach())
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for module in (student, disk) for p in module.parameters())])
    assert all(gradient.abs().max() > 0 for gradient in found[0])
    for cached, direct in zip(*found, strict=True):
        torch.testing.assert_close(cached, direct, rtol=5e-3, atol=1e-3 * direct.abs().max().item())


def test_a_tap_a_named_layer_and_a_subset_are_cached_too(tmp_path):
    teacher, subset = make_teacher(), Subset(Images(Transform()), [7, 2, 5])
    expected = online(teacher, SeededViews(subset, 2), 1, 1)
    caches = [
        write(tmp_path / "tap", with_features(teacher), SeededViews(subset, 2)),
        write(tmp_path / "named", teacher, SeededViews(subset, 2), mode="logits+features", layer="5"),
    ]
    for cache in caches:
        torch.testing.assert_close(cache(1, 1), expected, rtol=2e-3, atol=1e-3)
        assert cache.layer == "5"


def test_a_data_set_without_randomness_is_its_own_single_view(tmp_path):
    teacher = make_teacher()
    cache = write(tmp_path, teacher, Images())
    assert cache.views == 1
    torch.testing.assert_close(cache(4, 0), online(teacher, SeededViews(Images(), 1), 4, 0), rtol=2e-3, atol=1e-3)
    TeacherCache(tmp_path, teacher=teacher, dataset=Images())


def test_writing_leaves_modes_and_generators_and_needs_no_gradient(tmp_path):
    teacher = make_teacher().train()
    teacher[2].eval()
    modes = [module.training for module in teacher.modules()]
    state, before = copy.deepcopy(teacher.state_dict()), generator_states()
    write(tmp_path, teacher)
    assert [module.training for module in teacher.modules()] == modes
    assert generator_states() == before
    assert all(torch.equal(state[name], value) for name, value in teacher.state_dict().items())


def test_workers_and_batch_size_change_nothing_that_is_read(tmp_path):
    index, view = everything()
    one = write(tmp_path / "one", num_workers=2, batch_size=7)(index, view)
    torch.testing.assert_close(one, write(tmp_path / "other")(index, view), rtol=2**-9, atol=1e-4)


@pytest.mark.parametrize(("mode", "bar"), [("features", 530), ("logits+features", 730)])
def test_bytes_per_sample_view_of_256_features_and_100_classes(tmp_path, mode, bar):
    teacher = nn.Sequential(nn.Linear(12, 256), nn.ReLU(), nn.Linear(256, 100))
    write(tmp_path, teacher, SeededViews(Images(samples=400), 5), mode=mode, batch_size=500)
    files = contents(tmp_path)
    assert sum(map(len, files.values())) - len(files.get("head.pt", b"")) <= bar * 2000
    assert len(files.get("head.pt", b"")) <= 4 * 101 * 256 + 2000  # once, whatever the number of samples


def test_progress_is_shown_only_if_wanted(tmp_path, capsys):
    write(tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    write(tmp_path / "shown", progress=True)
    assert "teacher outputs: 100%" in capsys.readouterr().err


def test_no_bar_without_tqdm(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    write(tmp_path, progress=True)
    assert capsys.readouterr().err == ""


# ---- what cannot be cached -------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Multiplies what its teacher gives."""

    def __init__(self, factor, teacher=None):
        super().__init__()
        self.teacher, self.factor = teacher or make_teacher(), factor

    def forward(self, x):
        return self.factor * self.teacher(x)


class OwnGenerator(Images):
    """Draws from a generator that nobody else can seed."""

    def __getitem__(self, index):
        self.own = getattr(self, "own", torch.Generator())
        return torch.rand(12, generator=self.own), 0


def at_sample_six(value):
    views = SeededViews(Images(), VIEWS)
    views.dataset.images[6] = value
    return views


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mode": "both"}, ValueError, "mode must be one of .*, got 'both'"),
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ({"views": Images(Transform())}, ValueError, r"item 0 must not draw random numbers.*SeededViews"),
        ({"views": Images(Transform(("random",), 0.0))}, ValueError, "must not draw random numbers"),
        ({"views": Images(Transform(("numpy",)))}, ValueError, "must not draw random numbers"),
        ({"views": SeededViews(OwnGenerator(), 2)}, ValueError, "generator of its own"),
        ({"views": OwnGenerator()}, ValueError, "generator of its own"),
        ({"views": Returning(lambda i: (str(i), 0))}, TypeError, "image as a Tensor, got str"),
        ({"views": Returning(lambda i: {"image": i})}, TypeError, "must be tuples .* got dict"),
        ({"views": Stream()}, TypeError, "map-style"),
        ({"teacher": Scaled(0.9)}, ValueError, "last Linear makes its logits.* use mode='logits'"),
        ({"teacher": Scaled(0.99)}, ValueError, "last Linear makes its logits.* use mode='logits'"),
        ({"layer": "2", "mode": "features"}, TypeError, "in_features or in_channels, got BatchNorm1d"),
        ({"layer": "1"}, ValueError, "last Linear makes its logits"),
        ({"teacher": nn.Conv1d(3, 5, 1), "layer": ""}, ValueError, "needs a Linear as layer, got Conv1d"),
        ({"teacher": nn.Identity()}, ValueError, "no nn.Linear"),
        ({"teacher": nn.Unflatten(1, (3, 4)), "mode": "logits"}, ValueError, r"logits must be \(1, width\), got"),
        ({"views": at_sample_six(1e7)}, ValueError, r"finite in float16 .* got [\d.]+ at index 6, view 0"),
        ({"views": at_sample_six(torch.nan), "mode": "logits"}, ValueError, "got nan at index 6, view 0"),
        ({"views": at_sample_six(torch.nan)}, ValueError, "got nan at index 6, view 0"),
        ({"teacher": Scaled(1e7), "mode": "logits"}, ValueError, r"got -?[\d.]+ at index 0, view 0"),
    ],
)
def test_write_refuses_what_would_not_be_the_teacher(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        write(tmp_path / "cache", **settings)
    with pytest.raises((FileNotFoundError, RuntimeError)):
        TeacherCache(tmp_path / "cache")


@pytest.mark.parametrize("mode", ["logits", "logits+features"])
def test_a_teacher_that_scales_its_logits_is_cached_by_its_logits(tmp_path, mode):
    teacher = Scaled(0.5)
    cache = write(tmp_path, teacher, mode=mode, layer="teacher.5")
    expected = 0.5 * online(teacher.teacher, seeded_views(), 2, 1)[0]
    torch.testing.assert_close(cache(2, 1)[0], expected, rtol=2e-3, atol=1e-3)


class Giving(nn.Module):
    """Its logits, a Linear's, and the features that it reads, in types of their own; the first sample has these."""

    def __init__(self, features, dtype, logits_dtype):
        super().__init__()
        self.head, self.dtype, self.logits_dtype = nn.Linear(WIDTH, CLASSES).to(dtype), dtype, logits_dtype
        self.register_buffer("first", torch.tensor(features))

    def forward(self, x):
        features = x[:, :WIDTH] / 16
        own = (x[:, 8:] == 1).all(1, keepdim=True)
        return self.head(torch.where(own, self.first, features).to(self.dtype)).to(self.logits_dtype)


def giving(features, dtype, logits_dtype=None):
    views = SeededViews(Images(), 1)
    views.dataset.images[6, 8:] = 1
    return Giving(features, dtype, logits_dtype or dtype), views


@pytest.mark.parametrize("mode", ["logits", "logits+features", "features"])
@pytest.mark.parametrize("dtypes", [(torch.float16,), (torch.bfloat16,), (torch.bfloat16, torch.float32)], ids=str)
def test_half_outputs_alone_and_mixed_are_stored_as_they_are(tmp_path, mode, dtypes):
    values = [0.0, 1.0, -2.5, 2**-14, 60000.0 // 512 * 512, -65280.0, 2**-20, 3.0]  # bfloat16's too
    teacher, views = giving(values, *dtypes)
    with torch.no_grad():
        teacher.head.weight.copy_(torch.eye(CLASSES, WIDTH))
        teacher.head.bias.zero_()
    cache = write(tmp_path, teacher, views, mode=mode)
    logits, features = cache(6, 0)
    assert logits.dtype == torch.float32
    assert logits.tolist() == values[:CLASSES]
    if features is not None:
        assert features.dtype == torch.float32
        assert features.tolist() == values
    index = torch.arange(SAMPLES)
    images = torch.stack([views.item(each, 0)[0] for each in range(SAMPLES)])
    with torch.no_grad():
        online = teacher(images).double()
    # below 2**-14 float16 has fewer digits than bfloat16: an absolute rounding of 2**-25
    torch.testing.assert_close(cache(index, 0)[0].double(), online, rtol=0, atol=2**-25)
    assert cache.verify(teacher, views, share=1.0) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [65536.0, -1e30, float("inf"), float("nan")])
def test_a_bfloat16_that_float16_does_not_hold_is_refused_with_its_place(tmp_path, mode, value):
    teacher, views = giving([0.0, 1.0, value, 0.0, 1.0, 1.0, 1.0, 1.0], torch.bfloat16)
    came = re.escape(str(torch.tensor(value).bfloat16().item()))
    name, came = ("logit 0", ".*") if mode.startswith("logits") else ("feature 2", came)
    message = rf"finite in float16 \(up to 65504\), got {came} at index 6, view 0, {name}: bound it in the teacher"
    with torch.no_grad():
        teacher.head.weight.fill_(1)
    with pytest.raises(ValueError, match=message):
        write(tmp_path, teacher, views, mode=mode)
    with pytest.raises(RuntimeError, match="must hold all 10 sample-views"):
        TeacherCache(tmp_path)


def test_a_masked_class_is_refused_by_the_logit(tmp_path):
    class Masked(Giving):
        def forward(self, x):
            return super().forward(x).index_fill(1, torch.tensor([3]), -torch.inf)

    teacher, views = Masked([0.0] * WIDTH, torch.float16, torch.float16), giving([0.0] * WIDTH, torch.float16)[1]
    for mode in ("logits", "logits+features"):
        with pytest.raises(ValueError, match=r"got -inf at index 0, view 0, logit 3: .* mask what is read instead"):
            write(tmp_path / mode, teacher, views, mode=mode, layer="head")


def test_logits_that_overflow_in_float16_are_not_called_another_layers(tmp_path):
    teacher, views = giving([60000.0] * WIDTH, torch.float16)
    with torch.no_grad():
        teacher.head.weight.fill_(1)
    with pytest.raises(
        ValueError, match=r"logits must be finite, got inf in torch.float16 from finite features: write in"
    ):
        write(tmp_path, teacher, views)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_images_are_cached_and_known_again(tmp_path, dtype):
    class HalfImages(Images):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return image.to(dtype), target

    teacher, views = make_teacher().to(dtype).eval(), SeededViews(HalfImages(Transform()), VIEWS)
    cache = write(tmp_path, teacher, views)
    expected = online(teacher, views, 7, 2)
    assert expected[1].dtype == dtype
    torch.testing.assert_close(cache(7, 2)[1], expected[1].float(), rtol=0, atol=2**-25)
    torch.testing.assert_close(cache(7, 2)[0], expected[0].float(), rtol=2e-2, atol=2e-2)
    TeacherCache(tmp_path, teacher=teacher, dataset=views)
    with pytest.raises(RuntimeError, match="images: expected"):
        TeacherCache(tmp_path, dataset=seeded_views())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_teacher_in_half_precision_is_no_scaled_teacher(tmp_path, half):
    index, view = everything()
    expected = write(tmp_path / "exact")(index, view)[0]
    with torch.autocast("cpu", half):
        cache = write(tmp_path / "half")
    torch.testing.assert_close(cache(index, view)[0], expected, rtol=3e-2, atol=3e-2)


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def other_weights():
    teacher = make_teacher()
    teacher[2].running_mean[0] += 1e-3
    return teacher


def changed(attribute, value):
    views = seeded_views()
    setattr(views.dataset, attribute, value)
    return views


class Documented(Transform):
    """A transform whose repr says all, or not."""

    def __init__(self, text, **settings):
        super().__init__(**settings)
        self.text = text

    def __repr__(self):
        return self.text


OTHERS = [
    ({"teacher": other_weights()}, "teacher weights: expected [0-9a-f]{64}, got [0-9a-f]{64}"),
    ({"teacher": make_teacher().double()}, "teacher weights"),
    ({"dataset": seeded_views(seed=3)}, "seed: expected 0, got 3\n  images"),
    ({"dataset": SeededViews(Images(Transform()), 2)}, "views: expected 3, got 2"),
    ({"dataset": SeededViews(Images(Transform(), 9), 3)}, r"data set: expected .*\(10 samples.*got .*\(9 samples"),
    ({"dataset": changed("targets", torch.zeros(SAMPLES))}, "data set: expected .* targets .*, got .* targets"),
    ({"dataset": changed("images", Images().images.flip(0))}, "images: expected"),
    ({"dataset": changed("transform", Transform(scale=0.25))}, "images: expected"),
    ({"dataset": changed("transform", Documented("Scale(0.5)"))}, r"transform: expected <.*>, got Scale\(0.5\)"),
    ({"dataset": changed("transform", None)}, "transform: expected .*Transform object>, got None"),
    ({"dataset": SeededViews(Subset(Images(Transform()), range(SAMPLES)), 3)}, "data set: expected"),
    ({"dataset": Images()}, "seed: expected 0, got None"),
]


@pytest.mark.parametrize(("other", "named"), OTHERS)
def test_opening_with_something_else_says_what_differs(tmp_path, other, named):
    write(tmp_path)
    with pytest.raises(RuntimeError, match="(?s)written for something else:.*" + named):
        TeacherCache(tmp_path, **other)


def test_only_what_differs_is_named(tmp_path):
    write(tmp_path)
    with pytest.raises(RuntimeError) as error:
        TeacherCache(tmp_path, teacher=other_weights(), dataset=seeded_views())
    assert re.findall(r"\n  ([\w ]+):", str(error.value)) == ["teacher weights"]


def test_a_random_data_set_without_seeded_views_is_refused_for_reading_too(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="SeededViews"):
        TeacherCache(tmp_path, dataset=Images(Transform()))


def test_the_same_teacher_and_data_set_made_anew_are_accepted(tmp_path):
    write(tmp_path)
    again = seeded_views()
    assert repr(again.dataset.transform) != repr(seeded_views().dataset.transform)  # an address in each
    again.set_epoch(1)
    for teacher in (make_teacher().train(), with_features(make_teacher())):
        TeacherCache(tmp_path, teacher=teacher, dataset=again)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mode": "logits"}, "mode: expected features, got logits"),
        ({"mode": "logits+features", "layer": "1"}, "layer: expected 5, got 1"),
        ({"teacher": other_weights()}, "teacher weights"),
        ({"views": seeded_views(seed=3)}, "seed: expected 0, got 3"),
    ],
)
@pytest.mark.parametrize("complete", [False, True])
def test_writing_into_the_cache_of_something_else_is_refused_and_leaves_it(tmp_path, settings, named, complete):
    write(tmp_path) if complete else interrupt(tmp_path, 2)
    before = contents(tmp_path)
    with pytest.raises(RuntimeError, match=f"(?s)another folder or delete it:.*{named}"):
        write(tmp_path, **settings)
    assert contents(tmp_path) == before


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_no_cache_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got no meta\.json"):
        TeacherCache(tmp_path / "nowhere")


def test_an_interrupted_cache_says_how_much_is_written_and_how_to_go_on(tmp_path):
    interrupt(tmp_path, 2)
    with pytest.raises(RuntimeError, match=r"all 30 sample-views, got 8: .*TeacherCache.write .* resumes"):
        TeacherCache(tmp_path)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["data.bin", "head.pt", "checksums.bin"])
@pytest.mark.parametrize("change", [-1, 1, None])
def test_a_file_of_another_size_is_refused_with_both_sizes(tmp_path, name, change):
    write(tmp_path)
    path = tmp_path / name
    size = path.stat().st_size
    if change is None:
        path.unlink()
    else:
        os.truncate(path, size + change)
    came = 0 if change is None else size + change
    with pytest.raises(RuntimeError, match=rf"{name} must have {size} bytes, got {came}"):
        TeacherCache(tmp_path)
    with pytest.raises(RuntimeError, match=rf"{name} must have {size} bytes, got {came}"):
        write(tmp_path)


def test_an_interrupted_cache_that_lost_counted_rows_is_not_resumed(tmp_path):
    interrupt(tmp_path, 2)
    os.truncate(tmp_path / "data.bin", 100)
    with pytest.raises(RuntimeError, match=f"must have {2 * BATCH * WIDTH * 2} bytes, got 100"):
        write(tmp_path)


NO_DESCRIPTIONS = {
    "empty": b"",
    "cut off": b'{"format": 1, "mode"',
    "lacking": b'{"format": 1}',
    "a list": b"[]",
    "without format": b'{"mode": "logits"}',
    "another program's": b'{"format": 1, "name": "resnet50", "author": "me"}',
    "another type": b'{"format": 1, "samples": "10", "views": 3}',
    "zeros": bytes(300),
    "garbage": bytes(range(256)),
}


@pytest.mark.parametrize("content", NO_DESCRIPTIONS.values(), ids=NO_DESCRIPTIONS.keys())
def test_what_is_no_description_is_refused_with_its_name_and_the_cure(tmp_path, content):
    write(tmp_path)
    (tmp_path / "meta.json").write_bytes(content)
    message = (
        rf"meta.json must be a cache's description, got {len(content)} bytes, damaged .*: choose another folder, or"
    )
    with pytest.raises(RuntimeError, match=message):
        TeacherCache(tmp_path)
    with pytest.raises(RuntimeError, match=message):
        write(tmp_path)


@pytest.mark.parametrize("found", [3, 0, "1.2"])
def test_a_cache_of_another_format_is_refused(tmp_path, found):
    write(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(meta_of(tmp_path) | {"format": found, "new": 0}))
    with pytest.raises(RuntimeError, match=f"must have format 1 or 2, got {found!r}: choose another folder"):
        TeacherCache(tmp_path)


@pytest.mark.parametrize("mode", ["features", "logits"])
@pytest.mark.parametrize("name", ["data.bin", "checksums.bin", "head.pt"])
def test_a_file_that_no_cache_knows_of_is_not_overwritten(tmp_path, name, mode):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(
        FileExistsError, match=rf"{name} must not exist without its meta.json, got 4 bytes: choose anoth"
    ):
        write(tmp_path, mode=mode)
    assert (tmp_path / name).read_bytes() == b"mine"


# ---- checksums -------------------------------------------------------------------------------------------------------


def block_of(place, mode):
    """What is where: block, first and last row of it, rows in a block."""
    width = {"features": WIDTH, "logits": CLASSES, "logits+features": CLASSES + WIDTH}[mode]
    block_rows = max(1, 3 * 2 * WIDTH // (2 * width))
    block = place // (2 * width * block_rows)
    return block, block * block_rows, min((block + 1) * block_rows, ROWS) - 1, block_rows * 2 * width


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_one_flipped_byte_is_found_when_its_block_is_first_read(tmp_path, mode, where):
    index, view = everything()
    expected = write(tmp_path, mode=mode)(index, view)
    path = tmp_path / "data.bin"
    before = path.read_bytes()
    place = int(where * len(before)) % len(before)
    flip(path, place)
    block, first, last, size = block_of(place, mode)
    cache = TeacherCache(tmp_path, teacher=make_teacher(), dataset=seeded_views())
    rows = view * SAMPLES + index
    sound = (rows < first) | (rows > last)
    for part, same in zip(cache(index[sound], view[sound]), expected, strict=True):
        if part is not None:
            torch.testing.assert_close(part, same[sound])
    crc = [zlib.crc32(content[block * size : (block + 1) * size]) for content in (before, path.read_bytes())]
    spot = f"index {first % SAMPLES}, view {first // SAMPLES} to index {last % SAMPLES}, view {last // SAMPLES}"
    message = (
        rf"data.bin must have CRC-32 {crc[0]:08x} in its block {block} \(from byte {block * size}, .*: {spot}\), "
        rf"got {crc[1]:08x}: .* damaged; delete the folder and write it anew"
    )
    for row in (first, last):
        for _ in range(2):  # not only the first time
            with pytest.raises(RuntimeError, match=message):
                cache(row % SAMPLES, row // SAMPLES)
    with pytest.raises(RuntimeError, match=message):
        cache(index, view)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", ["small_blocks", None])
def test_a_small_share_of_verify_finds_a_flipped_byte_anywhere(tmp_path, mode, blocks, request):
    if blocks:
        request.getfixturevalue(blocks)
    write(tmp_path, mode=mode)
    for place in range(0, (tmp_path / "data.bin").stat().st_size, 37):
        flip(tmp_path / "data.bin", place, 1)
        with pytest.raises(RuntimeError, match=r"data.bin must have CRC-32 [0-9a-f]{8} in its block"):
            TeacherCache(tmp_path).verify(make_teacher(), seeded_views(), share=0.01)
        flip(tmp_path / "data.bin", place, 1)
    assert TeacherCache(tmp_path).verify(make_teacher(), seeded_views(), share=0.01) < 2e-3


@pytest.mark.usefixtures("small_blocks")
def test_verify_compares_again_what_was_read_before(tmp_path):
    cache = write(tmp_path)
    cache(*everything())
    with (tmp_path / "data.bin").open("r+b") as file:  # the disk fails while it is mapped
        file.seek(100)
        file.write(b"\x11")
    with pytest.raises(RuntimeError, match="in its block 2 "):
        cache.verify(make_teacher(), seeded_views())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["head.pt", "meta.json", "checksums.bin"])
def test_a_flipped_byte_of_another_file_is_found_too(tmp_path, name):
    cache = write(tmp_path)
    index, view = everything()
    expected, content = cache(index, view), (tmp_path / name).read_bytes()
    for place in range(0, len(content), {"head.pt": 37, "meta.json": 3}.get(name, 1)):
        flip(tmp_path / name, place, 1)
        if (
            name == "meta.json" and chr(content[place]).isspace()
        ):  # another space or none: it says the same or is refused
            (tmp_path / name).write_bytes(content)
            continue
        with pytest.raises(RuntimeError, match=name):
            TeacherCache(tmp_path)(index, view)
        (tmp_path / name).write_bytes(content)
    assert all(torch.equal(*parts) for parts in zip(TeacherCache(tmp_path)(index, view), expected, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_each_block_is_compared_once_in_a_process(tmp_path, monkeypatch):
    write(tmp_path)
    compared, cache = [], TeacherCache(tmp_path)
    monkeypatch.setattr(checksums.BlockChecks, "_compare", lambda self, block: compared.append(block))
    cache(4, 0)
    assert compared == [1]
    cache(torch.tensor([5, 3, 0]), 0)
    assert compared == [1, 0]
    for _ in range(3):
        cache(*everything())
    assert compared == [1, 0, *range(2, 10)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("samples", "batch_size"), [(10, 4), (10, 1), (10, 50), (9, 9)])
def test_checksums_are_those_of_the_file_whatever_the_batches(tmp_path, mode, samples, batch_size):
    write(tmp_path, views=SeededViews(Images(samples=samples), 2), mode=mode, batch_size=batch_size)
    meta, data = meta_of(tmp_path), (tmp_path / "data.bin").read_bytes()
    size = meta["block_rows"] * len(data) // (2 * samples)
    kept = (tmp_path / "checksums.bin").read_bytes()
    found = [int.from_bytes(kept[start : start + 4], "little") for start in range(0, len(kept), 4)]
    whole = len(data) // size
    assert found == [zlib.crc32(data[block * size : (block + 1) * size]) for block in range(whole)]
    assert meta["tail"] == zlib.crc32(data[whole * size :])


def test_a_block_is_64_kib_of_whole_rows(tmp_path):
    teacher = nn.Sequential(nn.Linear(12, 256), nn.ReLU(), nn.Linear(256, 100))
    write(tmp_path, teacher, SeededViews(Images(samples=100), 2), batch_size=60)
    assert meta_of(tmp_path)["block_rows"] == 2**16 / 512
    assert (tmp_path / "checksums.bin").stat().st_size == 4  # of 200 rows 128


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_from_before_the_checksums_is_read_as_ever(tmp_path, mode):
    cache, (index, view) = write(tmp_path, mode=mode), everything()
    as_written_before_checksums(tmp_path)
    before = contents(tmp_path)
    again = TeacherCache(tmp_path, teacher=make_teacher(), dataset=seeded_views())
    for part, same in zip(again(index, view), cache(index, view), strict=True):
        assert part is same is None or torch.equal(part, same)
    with pytest.warns(UserWarning, match="was written without checksums: .* share=1 recomputes all") as caught:
        assert again.verify(make_teacher(), seeded_views(), share=1.0) < 2e-3
    assert caught[0].filename == __file__
    write(tmp_path, mode=mode)  # only opens it
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mode", MODES)
def test_a_cache_begun_before_the_checksums_is_finished_without(tmp_path, mode):
    interrupt(tmp_path / "cut", 3, mode=mode)
    as_written_before_checksums(tmp_path / "cut")
    teacher = make_teacher()
    cache = write(tmp_path / "cut", teacher, mode=mode)
    assert teacher[0].seen == ROWS - 3 * BATCH + 1
    whole = contents(write(tmp_path / "whole", mode=mode).folder)
    assert contents(tmp_path / "cut")["data.bin"] == whole["data.bin"]
    with pytest.warns(UserWarning, match="without checksums"):
        cache.verify(make_teacher(), seeded_views())


NO_HEADS = {
    "garbage": lambda size: bytes(range(256)) * (size // 256) + bytes(size % 256),
    "zeros": bytes,
    "text": lambda size: b"# weights\n" * size,
    "a pickle": lambda size: pickle.dumps({"weight": 1}).ljust(size, b"\0"),
    "another program's": lambda size: torch_file({"model": torch.zeros(3)}),
    "a tensor": lambda size: torch_file(torch.zeros(CLASSES, WIDTH)),
    "without bias": lambda size: torch_file({"weight": torch.zeros(CLASSES, WIDTH)}),
    "of another teacher": lambda size: torch_file({"weight": torch.zeros(7, WIDTH), "bias": torch.zeros(7)}),
    "no tensors": lambda size: torch_file({"weight": [1.0], "bias": None}),
}


def torch_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's, of the garbage
@pytest.mark.parametrize("kind", NO_HEADS)
@pytest.mark.parametrize("checked", [True, False])
def test_what_is_no_last_layer_is_refused_with_its_name_and_the_cure(tmp_path, kind, checked):
    write(tmp_path)
    content = NO_HEADS[kind](meta_of(tmp_path)["head_bytes"])
    if not checked:
        as_written_before_checksums(tmp_path)
        entries = meta_of(tmp_path) | {"head_bytes": len(content)}
        (tmp_path / "meta.json").write_text(json.dumps(entries))
    (tmp_path / "head.pt").write_bytes(content)
    with pytest.raises(
        RuntimeError, match=r"head.pt must h.*, got .*: .*delete the folder and write it anew"
    ) as caught:
        TeacherCache(tmp_path)
    assert "weights_only" not in str(caught.value)
    if not checked:
        assert "must hold the teacher's last layer, tensors of shape (5, 8) and (5,), got" in str(caught.value)


@pytest.mark.parametrize("read_from", ["another folder", "a spawned process"])
def test_a_cache_of_a_relative_folder_is_read_from_elsewhere(tmp_path, monkeypatch, read_from):
    monkeypatch.chdir(tmp_path)
    cache = write("here")
    assert torch.equal(cache(3, 1)[0], TeacherCache(Path("here"))(3, 1)[0])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    if read_from == "another folder":
        again = pickle.loads(pickle.dumps(cache))(3, 1)
    else:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            again = pool.apply_async(cache, (3, 1)).get(timeout=60)  # a worker that cannot read it is started anew
    assert torch.equal(again[0], cache(3, 1)[0])


def test_a_data_set_that_changes_the_folder_does_not_scatter_the_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def item(index):
        os.chdir(tmp_path / "elsewhere")
        return torch.full((12,), float(index)), 0

    cache = write("here", views=SeededViews(Returning(item), 2))
    assert cache.folder == tmp_path / "here"
    assert sorted(contents(tmp_path / "here")) == ["data.bin", "head.pt", "meta.json"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    class Intruding(Counting):
        def forward(self, x):
            if len(x) > 1:
                with pytest.raises(RuntimeError, match="one writer at a time"):
                    write(tmp_path)
            return super().forward(x)

    teacher = make_teacher()
    teacher[0] = Intruding()
    write(tmp_path, teacher)
    assert contents(tmp_path) == contents(write(tmp_path.with_name("alone")).folder)


@pytest.mark.parametrize(
    ("index", "view", "error", "message"),
    [
        (SAMPLES, 0, ValueError, r"index must be in \[0, 10\), got 10"),
        (-1, 0, ValueError, r"index must be in \[0, 10\), got -1"),
        (torch.tensor([0, 12]), 0, ValueError, r"index must be in \[0, 10\), got 0 to 12"),
        (torch.tensor([0, 1]), torch.tensor([0, 3]), ValueError, r"view must be in \[0, 3\), got 0 to 3"),
        (torch.tensor([0, 1]), torch.tensor([0, 1, 2]), ValueError, r"index's shape \(2,\), got \(3,\)"),
        (torch.tensor([0.0]), 0, TypeError, "index must be an int or an int64 Tensor, got torch.float32"),
        (0, True, TypeError, "view must be an int or an int64 Tensor, got bool"),
    ],
)
def test_places_outside_the_cache_are_refused(tmp_path, index, view, error, message):
    with pytest.raises(error, match=message):
        write(tmp_path)(index, view)


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpys_integers_are_places_too(tmp_path, integer):
    cache = write(tmp_path)
    logits, features = cache(integer(3), integer(2))
    assert torch.equal(logits, cache(3, 2)[0])
    assert torch.equal(features, cache(torch.tensor([1, 3]), integer(2))[1][1])
    with pytest.raises(ValueError, match=r"view must be in \[0, 3\), got 3"):
        cache(integer(0), integer(3))


@pytest.mark.parametrize("value", [np.True_, np.float64(1), np.array([1, 2])])
def test_numpys_other_values_are_no_places(tmp_path, value):
    cache = write(tmp_path)
    with pytest.raises(TypeError, match=f"index must be an int or an int64 Tensor, got {type(value).__name__}"):
        cache(value, 0)


def test_a_place_that_int64_does_not_hold_is_out_of_range(tmp_path):
    with pytest.raises(ValueError, match=rf"index must be in \[0, 10\), got {2**70}"):
        write(tmp_path)(2**70, 0)


def test_numpys_numbers_write_and_verify_the_same_cache(tmp_path):
    views = SeededViews(Images(Transform()), np.int8(VIEWS), seed=np.int64(0))
    cache = write(tmp_path / "numpy", views=views, batch_size=np.int64(BATCH), num_workers=np.int64(1))
    assert contents(cache.folder) == contents(write(tmp_path / "plain").folder)
    settings = {"tolerance": np.float32(0.01), "batch_size": np.int32(BATCH), "num_workers": np.int64(0)}
    teachers, found = [make_teacher(), make_teacher()], []
    found.append(cache.verify(teachers[0], views, share=np.float64(0.5), seed=np.int64(3), **settings))
    found.append(cache.verify(teachers[1], views, share=0.5, seed=3))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert teachers[0][0].seen == teachers[1][0].seen == ROWS / 2


def test_a_share_in_float16_is_not_rounded_further(tmp_path):
    share, teacher = np.float16(1502 / 4096), make_teacher()  # of 30: 11.001, in float16 11
    write(tmp_path).verify(teacher, seeded_views(), share=share)
    assert teacher[0].seen == 12


# ---- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_verify_passes_on_the_same_teacher_and_recomputes_a_share(tmp_path, mode):
    cache, teacher = write(tmp_path, mode=mode), make_teacher().train()
    assert cache.verify(teacher, seeded_views(), share=0.5) < 2e-3
    assert teacher[0].seen == ROWS / 2
    assert teacher.training
    cache.verify(teacher, seeded_views())
    assert teacher[0].seen == ROWS / 2 + 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:.*without checksums")
def test_verify_names_the_place_of_a_row_that_is_not_the_teachers(tmp_path, mode):
    cache = write(tmp_path, mode=mode)
    as_written_before_checksums(tmp_path)
    row_bytes = (tmp_path / "data.bin").stat().st_size // ROWS
    with (tmp_path / "data.bin").open("r+b") as file:
        file.seek((2 * SAMPLES + 7) * row_bytes)  # view 2 of sample 7: views lie one after the other
        file.write(torch.full((row_bytes // 2,), 3.0, dtype=torch.float16).numpy().tobytes())
    with pytest.raises(RuntimeError, match=r"got [\d.]+ in the \w+ of index 7, view 2"):
        TeacherCache(tmp_path).verify(make_teacher(), seeded_views(), share=1.0)
    assert cache.views == VIEWS


def test_verify_finds_other_weights_another_seed_and_nan(tmp_path):
    cache, teacher = write(tmp_path), make_teacher()
    with torch.no_grad():
        teacher[5].weight[0] += 1
    with pytest.raises(RuntimeError, match="in the logits of index"):
        cache.verify(teacher, seeded_views(), share=0.2)
    with pytest.raises(RuntimeError, match=r"must equal the teacher within 0\.01"):
        cache.verify(make_teacher(), seeded_views(seed=1), share=0.2)
    with torch.no_grad():
        teacher[1].weight.fill_(torch.nan)
    with pytest.raises((RuntimeError, ValueError)):
        cache.verify(teacher, seeded_views(), share=0.2)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"share": 0.0}, ValueError, "share must be > 0"),
        ({"share": 1.5}, ValueError, "share must be <= 1"),
        ({"tolerance": -1.0}, ValueError, "tolerance must be >= 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
        ({"seed": True}, TypeError, "seed must be an int, got bool"),
        ({"views": SeededViews(Images(), 4)}, RuntimeError, "10 samples in 3 views, got 10 in 4"),
        ({"teacher": nn.Linear(12, 7)}, (RuntimeError, ValueError), "5"),
        ({"tolerance": 0.0, "share": 1.0}, RuntimeError, "must equal the teacher within 0.0"),
    ],
)
def test_verify_refuses_bad_arguments(tmp_path, settings, error, message):
    cache = write(tmp_path)
    with pytest.raises(error, match=message):
        cache.verify(**{"teacher": make_teacher(), "views": seeded_views()} | settings)


# ---- interruption and other processes --------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tail", [0, 5, 100])
def test_resuming_recomputes_what_is_missing_and_gives_the_uninterrupted_files(tmp_path, mode, tail):
    interrupt(tmp_path / "cut", 3, mode=mode)
    with (tmp_path / "cut" / "data.bin").open("ab") as file:
        file.write(b"\x01" * tail)  # of a batch that was cut off
    with (tmp_path / "cut" / "checksums.bin").open("ab") as file:
        file.write(b"\x01" * (tail // 5))
    teacher = make_teacher()
    write(tmp_path / "cut", teacher, mode=mode)
    assert teacher[0].seen == ROWS - 3 * BATCH + 1  # the first sample is run to learn the shapes
    write(tmp_path / "whole", mode=mode)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    again = make_teacher()
    write(tmp_path / "cut", again, mode=mode)
    assert again[0].seen == 1


needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs a process that is a copy of this one"
)


def write_until_killed(folder, deadly_call, batches_begun):
    """In a process of its own: kill -9 it at its n-th call that puts something on the disk."""
    calls = 0

    def deadly(call):
        def wrapped(*args):
            nonlocal calls
            calls += 1
            if calls == deadly_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)

        return wrapped

    class Watched(Counting):
        def forward(self, x):
            batches_begun.value += len(x) > 1
            return super().forward(x)

    os.fsync, Path.replace = deadly(os.fsync), deadly(Path.replace)
    teacher = make_teacher()
    teacher[0] = Watched()
    write(folder, teacher, batch_size=10)


@needs_fork
@pytest.mark.usefixtures("small_blocks")
def test_kill_9_at_any_moment_loses_at_most_the_unfinished_batch(tmp_path):
    context, expected = multiprocessing.get_context("fork"), contents(write(tmp_path / "whole", batch_size=10).folder)
    for deadly_call in range(1, 30):
        folder, begun = tmp_path / str(deadly_call), context.Value("i", 0)
        process = context.Process(target=write_until_killed, args=(folder, deadly_call, begun))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        written = meta_of(folder)["written"] if (folder / "meta.json").exists() else 0
        assert written >= 10 * (begun.value - 1)
        teacher = make_teacher()
        write(folder, teacher, batch_size=10)
        assert teacher[0].seen == ROWS - written + 1
        assert contents(folder) == expected
    # two files, then for each of 3 batches the data, the checksums, the count and its place
    assert deadly_call == 4 + 3 * 4 + 1


def write_slowly(folder):
    """In a process of its own, whose loader worker hangs for a while after ten items."""
    read, reads = Images.__getitem__, iter(range(1000))

    def slow(self, index):
        if torch.utils.data.get_worker_info() and next(reads) > 10:
            time.sleep(2)
        return read(self, index)

    Images.__getitem__ = slow
    write(folder, num_workers=1)


@needs_fork
def test_kill_9_from_outside_with_a_loader_worker_that_lives_on(tmp_path):
    folder, deadline = tmp_path / "cut", time.monotonic() + 60
    process = multiprocessing.get_context("fork").Process(target=write_slowly, args=(folder,))
    process.start()
    while not (folder / "meta.json").exists() or meta_of(folder)["written"] < 2 * BATCH:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    written = meta_of(folder)["written"]
    assert written < ROWS
    with pytest.raises(RuntimeError, match=f"got {written}"):
        TeacherCache(folder)
    teacher = make_teacher()
    write(folder, teacher)  # the orphaned worker holds no lock
    assert teacher[0].seen == ROWS - written + 1
    assert contents(folder) == contents(write(tmp_path / "whole").folder)


def read_all(folder, barrier, results):
    cache = TeacherCache(folder, teacher=make_teacher(), dataset=seeded_views())
    barrier.wait(30)
    index, view = torch.arange(SAMPLES), torch.zeros(SAMPLES, dtype=torch.int64)
    found = [cache(index[torch.randperm(SAMPLES)], view + each % VIEWS)[0] for each in range(50)]
    results.put((len(found), cache(index, 1)[0].tolist()))


@needs_fork
def test_readers_read_at_the_same_time(tmp_path):
    cache, context = write(tmp_path), multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    readers = [context.Process(target=read_all, args=(tmp_path, barrier, results)) for _ in range(2)]
    for reader in readers:
        reader.start()
    found = [results.get(timeout=30) for _ in readers]
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0, 0]
    assert found == [(50, cache(torch.arange(SAMPLES), 1)[0].tolist())] * 2


def test_a_read_only_cache_is_read_and_pickles_as_its_path(tmp_path):
    cache = write(tmp_path)
    for path in tmp_path.iterdir():
        path.chmod(0o444)
    content = pickle.dumps(cache)
    assert len(content) < 500
    assert torch.equal(pickle.loads(content)(3, 1)[0], cache(3, 1)[0])


def test_changing_what_was_read_changes_no_file(tmp_path):
    before = contents(write(tmp_path, mode="logits").folder)
    cache = TeacherCache(tmp_path)
    logits = cache(torch.arange(SAMPLES), 0)[0]
    logits.zero_()
    assert cache(torch.arange(SAMPLES), 0)[0].abs().min() > 0
    assert contents(tmp_path) == before


def test_tensors_without_targets_are_cached(tmp_path):
    dataset = TensorDataset(torch.randn(6, 12))
    cache = write(tmp_path, views=SeededViews(dataset, 1))
    TeacherCache(tmp_path, dataset=SeededViews(dataset, 1))
    assert cache.samples == 6


def test_an_address_or_the_name_of_the_script_is_no_difference(tmp_path):
    write(tmp_path)
    elsewhere = type("Transform", (Transform,), {"__module__": "__main__"})
    TeacherCache(tmp_path, dataset=changed("transform", elsewhere()))
    with pytest.raises(RuntimeError, match="transform: expected <Transform object>, got <Other object>"):
        TeacherCache(tmp_path, dataset=changed("transform", type("Other", (Transform,), {})()))


@pytest.mark.parametrize("function", [SeededViews, TeacherCache, TeacherCache.write, TeacherCache.verify])
def test_docstring_names_the_arguments_of_the_signature(function):
    block = re.search(r"\nArgs:\n(.*?)\n\n", inspect.getdoc(function), re.DOTALL).group(1)
    expected = [name for name in inspect.signature(function).parameters if name != "self"]
    assert re.findall(r"^ {4}(\w+):", block, re.MULTILINE) == expected
