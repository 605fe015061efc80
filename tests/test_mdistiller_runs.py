"""Runs of the mdistiller adapter side by side: which settings tell them apart, which one is resumed, what stays."""

import importlib
import pickle
import re
import shutil

import numpy as np
import pytest
import test_mdistiller as shared
from test_mdistiller import launch, load, refused, registered

host = shared.host
pytestmark = shared.pytestmark


def rewritten(host, *, labels=False, images=False, out="changed"):
    """The test's data with other labels or images, in files of the same size."""
    folder = host.folder / out / "cifar-100-python"
    shutil.copytree(host.folder / "data" / "cifar-100-python", folder)
    content = pickle.loads((folder / "train").read_bytes())
    if labels:
        content["fine_labels"] = content["fine_labels"][::-1]
    if images:
        content["data"] = np.ascontiguousarray(content["data"][::-1])
    size = (folder / "train").stat().st_size
    (folder / "train").write_bytes(pickle.dumps(content))
    assert (folder / "train").stat().st_size == size
    return str(folder.parent)


@pytest.mark.parametrize("change", ["labels", "images"])
def test_other_data_of_equal_size_are_other_data_and_the_same_elsewhere_are_the_same(host, change):
    folder = launch(host, epochs=1)
    message = refused(host, "--resume", "--data-root", rewritten(host, **{change: True}))
    assert re.search(r"\n  data: (files of \d+ and \d+ bytes), \w+ then, \1, \w+ now\n", message)
    assert launch(host, "--resume", "--data-root", rewritten(host, out="same")) == folder
    assert load(folder / "latest")["epoch"] == 2


def images_in(root, kind="imagenet"):
    for split, number in (("train", 3), ("val", 1)):
        for label in ("cat", "dog"):
            folder = root / split / label / ("images" if kind == "tiny_imagenet" and split == "train" else "")
            folder.mkdir(parents=True)
            for name in range(number):
                (folder / f"{label}{name}.JPEG").write_bytes(bytes(10 + name))
    return root


@pytest.mark.parametrize("kind", ["imagenet", "tiny_imagenet"])
def test_folders_of_images_are_told_apart_by_names_labels_and_sizes(host, kind):
    modules = registered(host)
    cfg = modules.engine_cfg.CFG.clone()
    cfg.DATASET.TYPE = kind
    adapter = importlib.import_module("disk_plugin.integrations.mdistiller.host")

    def fingerprint(root):
        adapter.use_data(cfg, str(root))
        return adapter.fingerprint_data(cfg, str(root))

    first = fingerprint(images_in(host.folder / "a", kind))
    assert re.fullmatch(r"2 and 2 folders, [0-9a-f]{16}", first)
    same = images_in(host.folder / "b", kind)
    (same / "train" / ".DS_Store").touch()
    assert fingerprint(same) == first
    seen = {first}
    for number, change in enumerate(("rename", "relabel", "resize", "validation")):
        root = images_in(host.folder / str(number), kind)
        image = next((root / "train").rglob("cat0.JPEG"))
        if change == "rename":
            image.rename(image.with_name("cat7.JPEG"))
        elif change == "relabel":
            image.rename(next((root / "train" / "dog").rglob("dog0.JPEG")).with_name("cat0.JPEG"))
        elif change == "resize":
            image.write_bytes(bytes(99))
        else:
            (root / "val" / "dog" / "dog0.JPEG").rename(root / "val" / "cat" / "dog0.JPEG")
        seen.add(fingerprint(root))
    assert len(seen) == 5


@pytest.mark.parametrize("kind", ["imagenet", "cifar100"])
def test_the_hosts_own_folder_of_images_is_looked_into_and_cifar_is_what_the_host_checks_itself(host, kind):
    modules = registered(host)
    cfg = modules.engine_cfg.CFG.clone()
    cfg.DATASET.TYPE = kind
    adapter = importlib.import_module("disk_plugin.integrations.mdistiller.host")
    importlib.import_module("mdistiller.dataset.imagenet").data_folder = str(images_in(host.folder / "own"))
    printed = adapter.fingerprint_data(cfg, None)
    assert (
        printed == "the host's" if kind == "cifar100" else re.fullmatch("the host's, 2 and 2 folders, .{16}", printed)
    )
