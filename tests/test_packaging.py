"""What is installed and what importing it costs; what the distributions hold, and what an index shows of them."""

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PathDistribution
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
    hosts = "lightning", "mdistiller", "timm", "torchdistill", "torchvision", "sklearn", "matplotlib", "tqdm", "scipy"
    code = (
        "import sys, torch; before = set(sys.modules); import disk_plugin; "
        f"print(({{*{hosts}}} & set(sys.modules)) - before)"
    )
    assert run_python(code, cwd=tmp_path).strip() == "set()"


def test_the_version_is_a_string_that_the_metadata_repeats(tmp_path):
    code = "import importlib.metadata as m; print(m.version('disk-plugin'))"
    assert run_python(code, cwd=tmp_path).strip() == disk_plugin.__version__


def build(source, out, *kinds):
    """Build with the packages at hand; by default the sdist and, from it, the wheel."""
    command = [sys.executable, "-m", "build", *kinds, "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="session")
def requirements(wheel):
    """What the wheel asks for, ``name>=version``: by extra, that of the core under None."""
    found = {}
    (folder,) = (name for name in zipfile.Path(wheel).iterdir() if name.name.endswith(".dist-info"))
    for line in PathDistribution(folder).requires:
        requirement, *extra = re.fullmatch(r"([^;]+?)(?:; extra == ['\"](\w+)['\"])?", line).groups()
        found.setdefault(*extra, []).append(requirement)
    return found


def test_core_depends_on_torch_alone(requirements):
    assert [re.match(r"\w+", entry).group() for entry in requirements[None]] == ["torch"]
    assert {"examples", "test", "dev"} <= requirements.keys()


def test_the_oldest_versions_that_ci_installs_are_those_declared(requirements):
    entries = (entry for extra in requirements.keys() - {"dev"} for entry in requirements[extra])
    plain = (entry for entry in entries if not entry.startswith("disk-plugin["))
    declared = dict(re.fullmatch(r"([\w-]+)>=([\w.]+)", entry).groups() for entry in plain)
    lines = (line for line in (ROOT / ".ci/oldest.txt").read_text().splitlines() if not line.startswith("#"))
    tested = dict(re.fullmatch(r"([\w-]+)==([\w.]+?)(?:\.\*)?", line).groups() for line in lines)
    assert {name.lower(): version for name, version in declared.items()} == tested


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Sdist, the wheel built from it, and the wheel built from the checkout."""
    out = tmp_path_factory.mktemp("built")
    build(ROOT, out / "both")
    build(ROOT, out / "wheel", "--wheel")
    (sdist,), (wheel,), (direct,) = (
        (out / folder).glob(pattern)
        for folder, pattern in (("both", "*.tar.gz"), ("both", "*.whl"), ("wheel", "*.whl"))
    )
    return sdist, wheel, direct


@pytest.fixture(scope="session")
def wheel(built):
    return built[1]


def tracked(*folders):
    listing = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode or not listing.stdout:
        pytest.skip("not a git checkout")
    return listing.stdout.splitlines()


def test_wheels_hold_every_tracked_module_and_no_other_file(built):
    files = [line for line in tracked("disk_plugin", "integrations") if line != "disk_plugin/integrations"]
    expected = {re.sub("^integrations/", "disk_plugin/integrations/", line) for line in files}
    for wheel in built[1:]:
        names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        assert names == expected


def test_the_sdist_holds_tests_and_what_they_read_and_no_pictures(built):
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
        assert not any(member.issym() or member.islnk() for member in archive.getmembers())
    files = {name for name in tracked("tests", "examples", "benchmarks", "docs") if not name.endswith(".png")}
    assert files <= names
    assert not [name for name in names if name.endswith(".png")]
    assert built[0].stat().st_size < 1_500_000


@pytest.fixture(scope="session")
def metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope="session")
def urls(metadata):
    return dict(line.split(", ") for line in metadata.get_all("Project-URL"))


def page(metadata):
    return metadata.get_payload(decode=True).decode()


FENCED = re.compile(r"^(```+)\w*\n.*?^\1$", re.DOTALL | re.MULTILINE)
LINK = re.compile(
    r"""\]\(([^)\s]*)|^\[[^\]]+\]:\s*(\S+)|<[^>]+?\b(?:href|src|srcset)\s*=\s*["']([^"']*)""", re.MULTILINE
)


def links(text):
    """Targets of Markdown's links and images, inline or by reference, and of HTML's, but for those in code blocks."""
    return ["".join(found) for found in LINK.findall(FENCED.sub("", text))]


@pytest.mark.parametrize(
    "text",
    ["[a](b.md)", "![a](b.png)", "[![a](https://c/b.svg)](b)", "[a]: b", '<img alt="a"\n src="b.png">', "<a href='b'>"],
)
def test_relative_links_are_found(text):
    assert not all(link.startswith("https://") for link in links(text))


def test_the_page_on_the_index_has_absolute_links_and_images(metadata):
    found = links(page(metadata))
    assert len(found) >= len(links((ROOT / "README.md").read_text())) > 0
    assert [link for link in found if not link.startswith(("https://", "mailto:"))] == []


def test_the_page_on_the_index_links_files_that_are_there_and_shows_images_raw(metadata, urls):
    source, version = urls["Source"], disk_plugin.__version__
    raw = source.replace("github.com", "raw.githubusercontent.com")
    own = [link.split("#")[0] for link in links(page(metadata)) if f"/v{version}/" in link]
    assert own
    for link in own:
        path = link.removeprefix(f"{source}/blob/v{version}/").removeprefix(f"{raw}/v{version}/")
        assert (ROOT / path).exists() or path.endswith(".png"), link
        assert link.startswith(raw) == path.endswith((".png", ".svg", ".gif")), link


def test_the_page_on_the_index_has_readmes_code(metadata):
    blocks = [found.group() for found in FENCED.finditer(page(metadata))]
    assert blocks == [found.group() for found in FENCED.finditer((ROOT / "README.md").read_text())]


def test_the_project_has_one_address(urls):
    files = [ROOT / "pyproject.toml", ROOT / "CITATION.cff", ROOT / "mkdocs.yml", *ROOT.glob("*.md")]
    files += ROOT.glob("docs/**/*.md")
    texts = {path.name: path.read_text() for path in files if path.exists()}
    homes = {name: set(re.findall(r"https://github\.com/[\w.-]+/disk-plugin\b", text)) for name, text in texts.items()}
    pages = {name: set(re.findall(r"https://[\w.-]+\.github\.io/disk-plugin/?", text)) for name, text in texts.items()}
    assert set().union(*homes.values()) == {urls["Source"]} == {urls["Homepage"]}
    assert set().union(*pages.values()) == {urls["Documentation"]}
    assert homes["CITATION.cff"]


def test_no_module_of_the_library_is_longer_than_250_lines():
    for path in [*ROOT.glob("disk_plugin/**/*.py"), *ROOT.glob("integrations/**/*.py")]:
        assert len(path.read_text().splitlines()) <= 250, path


def test_changelog_and_citation_tell_the_version():
    version = disk_plugin.__version__
    (newest, *_) = re.findall(r"^## \[(\d[^\]]*)\] - (\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = (ROOT / "CITATION.cff").read_text()
    assert newest == (version, re.search(r'^date-released: "(.*)"$', citation, re.M)[1])
    assert re.search(r"^version: (.*)$", citation, re.M)[1] == version
