"""What is installed, what importing it costs, and that the wheel holds every tracked module."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import disk_plugin

ROOT = Path(__file__).parents[1]


def run_python(code, **options):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, **options).stdout


def test_import_exposes_the_public_names_and_nothing_else():
    assert set(disk_plugin.__all__) == {
        "DiSKLoss",
        "DualScheduler",
        "GuideHead",
        "__version__",
        "functional",
        "presets",
    }
    for name in [*disk_plugin.__all__, *disk_plugin.functional.__all__]:
        assert hasattr(disk_plugin, name) or hasattr(disk_plugin.functional, name)


def test_import_loads_no_host_and_no_extra(tmp_path):
    hosts = "mdistiller", "timm", "torchdistill", "torchvision", "sklearn", "matplotlib", "tqdm", "scipy"
    code = (
        "import sys, torch; before = set(sys.modules); import disk_plugin; "
        f"print(({{*{hosts}}} & set(sys.modules)) - before)"
    )
    assert run_python(code, cwd=tmp_path).strip() == "set()"


def test_core_depends_on_torch_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [re.match(r"\w+", entry).group() for entry in project["dependencies"]] == ["torch"]
    assert {"examples", "test", "dev"} <= project["optional-dependencies"].keys()


def test_the_version_is_a_string_that_the_metadata_repeats(tmp_path):
    code = "import importlib.metadata as m; print(m.version('disk-plugin'))"
    assert run_python(code, cwd=tmp_path).strip() == disk_plugin.__version__


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    # from a copy: setuptools leaves a build/ behind, whose deleted modules a later wheel would still hold
    copy = out / "source"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "data", "runs", "*.egg-info")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_tracked_module_and_no_top_level_integrations(wheel):
    listing = subprocess.run(
        ["git", "ls-files", "disk_plugin", "integrations"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    tracked = [line for line in listing.stdout.splitlines() if line != "disk_plugin/integrations"]
    expected = {re.sub("^integrations/", "disk_plugin/integrations/", line) for line in tracked}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


def test_no_module_of_the_library_is_longer_than_250_lines():
    for path in [*ROOT.glob("disk_plugin/**/*.py"), *ROOT.glob("integrations/**/*.py")]:
        assert len(path.read_text().splitlines()) <= 250, path
