"""Code blocks of README and docs/ run as they stand, page by page, around toy models; links and commands exist."""

import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from disk_plugin import DiSKLoss, DualScheduler, GuideHead

ROOT = Path(__file__).parents[1]
C, IMAGES = 5, (3, 4, 4)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


class Shown(nn.Module):
    """Logits and the last map."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, C)

    def forward(self, x):
        last = self.conv(x).relu()
        return self.fc(last.mean((2, 3))), last


class Staged(nn.Module):
    """Two stages, named as in ResNets."""

    def __init__(self, width):
        super().__init__()
        self.layer3, self.layer4 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 2, stride=2)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * width, C)

    def forward(self, x):
        return self.fc(self.avgpool(self.layer4(self.layer3(x))).flatten(1))


class Images(torch.utils.data.Dataset):
    """Images without random transforms."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full(IMAGES, index / 12), index % C


@pytest.fixture
def _torchrun(monkeypatch):
    """One process, as torchrun starts it."""
    address = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, value in address.items():
        monkeypatch.setenv(key, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def names(tmp_path, monkeypatch, _torchrun):
    """What a reader's own code has when a page's first block comes."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x, target = torch.randn(6, *IMAGES), torch.arange(6) % C
    train, held_out = ([(torch.randn(40, *IMAGES), torch.arange(40) % C)] for _ in range(2))
    return {
        "torch": torch,
        "F": F,
        "SGD": torch.optim.SGD,
        "DiSKLoss": DiSKLoss,
        "DualScheduler": DualScheduler,
        "GuideHead": GuideHead,
        "device": "cpu",
        "num_classes": C,
        "epochs": 2,
        "epoch": 0,
        "first_epoch": 0,
        "x": x,
        "images": x,
        "target": target,
        "loader": [(x, target)] * 2,
        "micro_batches": [(x, target)] * 2,
        "indexed_loader": [(torch.arange(6), (x, target))],
        "train_loader": train,
        "held_out_loader": held_out,
        "dataset": Images(),
    }


def add_models(names, page):
    """Add the models, and what an earlier page has made of them."""
    if page.name == "write_a_method.md":
        models = {"student": Shown(4), "teacher": Shown(6), "student_channels": 4, "teacher_channels": 6}
    elif page.name in ("scalekd.md", "simkd.md"):
        models = {"student": Staged(4), "teacher": Staged(8)}
    else:
        models = {
            "student": nn.Sequential(nn.Flatten(), nn.Linear(48, C)),
            "teacher": nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, C)).eval(),
        }
    names.update(models)
    if page.parent.name == "docs" and page.name not in ("from_kd.md", "write_a_host.md", "write_a_method.md"):
        disk = DiSKLoss(GuideHead(C))
        names |= {"disk": disk, "guide": disk.guide, "dual": DualScheduler(disk, epochs=2)}
        names["optimizer"] = torch.optim.SGD([*names["student"].parameters(), *disk.parameters()], lr=0.1)
        names["teacher_logits"] = names["teacher"](names["x"]).detach()
    return names


@pytest.mark.filterwarnings("ignore:the guide is dead:UserWarning")
@pytest.mark.filterwarnings("ignore:step.. was called:UserWarning")
@pytest.mark.filterwarnings("ignore:the module with R|the bottleneck.s noise:UserWarning")
@pytest.mark.filterwarnings("ignore:the teacher is right on:UserWarning")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # Lightning's own
@pytest.mark.filterwarnings(
    "ignore:.*(number of training batches|num_workers|does not have many workers|LOCAL_RANK):UserWarning"
)
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_the_blocks_of_a_page_run_one_after_the_other(page, names):
    source = page.read_text()
    for host in ("accelerate", "lightning", "timm", "transformers"):
        if re.search(rf"^(import {host}|from {host}|from disk_plugin.integrations.{host})\b", source, re.MULTILINE):
            pytest.importorskip(host, reason=f"the page needs {host}")
    if "plot_against_ce" in source:
        pytest.importorskip("matplotlib")
    names = add_models(names, page)
    for block in blocks(page):
        alone = block.startswith("import torch\n")  # and needs nothing that it does not make
        exec(compile(block, name_of(page), "exec"), {} if alone else names)


def test_the_page_on_hosts_saves_what_it_says(names):
    page = ROOT / "docs/write_a_host.md"
    names = add_models(names, page)
    exec(blocks(page)[0], names)
    saved = torch.load("checkpoint.pt", weights_only=True)
    assert saved["training"].keys() == {"disk", "method", "dual"}


def test_readmes_loop_trains_student_and_guide(names):
    loop = next(block for block in blocks(ROOT / "README.md") if "Distiller" in block)
    names = add_models(names, ROOT / "README.md")
    before = [parameter.clone() for parameter in names["student"].parameters()]
    exec(loop, names)
    assert names["distiller"].dual.epoch == names["epochs"] - 1
    assert all(not torch.equal(now, old) for now, old in zip(names["student"].parameters(), before, strict=True))
    assert all(parameter.grad.abs().sum() > 0 for parameter in names["distiller"].guided.disk.parameters())
    assert torch.load("student.pt", weights_only=True).keys() == names["student"].state_dict().keys()


def test_nothing_but_python_shell_and_text_is_shown_as_code():
    for page in PAGES:
        languages = set(re.findall(r"^```(\w+)", page.read_text(), re.MULTILINE))
        assert languages <= {"python", "bash", "powershell", "text", "bibtex", "yaml"}, name_of(page)


def commands():
    """Return (page, words) of every launcher's command on any page."""
    for page in PAGES:
        for line in "".join(blocks(page, "bash")).splitlines():
            if "disk_plugin.integrations." in line:
                yield page, shlex.split(line)


@pytest.mark.parametrize("host", ["mdistiller", "timm"])
def test_commands_name_flags_and_files_that_exist(host):
    module = f"disk_plugin.integrations.{host}"
    shown = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True).stdout
    of_host = [(page, words) for page, words in commands() if module in words]
    assert len(of_host) >= 4
    for page, words in of_host:
        words = words[words.index(module) + 1 :]
        own = [word for word in words if word.startswith("--") and (host == "mdistiller" or word.startswith("--disk-"))]
        assert all(re.search(rf"{flag}\b", shown) for flag in own), f"{name_of(page)}: {own}"
        files = [word for word in words if word.startswith("configs/") and word != "configs/cifar100/kd.yaml"]  # theirs
        assert all((ROOT / "integrations" / host / file).is_file() for file in files), f"{name_of(page)}: {files}"


def slug(heading):
    """As GitHub and the site make it."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize(
    "page",
    sorted({*PAGES, *ROOT.glob("*.md"), ROOT / "examples/README.md", ROOT / "benchmarks/README.md"}),
    ids=name_of,
)
def test_links_between_pages_and_files_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        target = page.parent / link if link else page
        assert target.exists(), f"{name_of(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name_of(page)}: {link}#{anchor}"


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1200
    prose = re.sub(r"^```.*?^```|^\|.*?$|^<!--.*?$|^#.*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    lengths = sorted(len(paragraph.split()) for paragraph in prose.split("\n\n") if paragraph.strip())
    assert lengths[len(lengths) // 2] <= 20, lengths


STUDENT_T = {2: 4.303, 4: 2.776, 7: 2.365}  # 97.5 % point by degrees of freedom
MEASURED = {  # README's rows among those of examples/gain.py
    "100 synthetic classes, 12 features": "scaffold_target 12, warm, 24 passes",
    "clusters": "clusters (new), warm, 10 passes",
    "digits under shifts, 4 units": "digits shifted, warm, 12 passes",
    "CIFAR-100 pixels, 8 units": "pixels 8, warm, 6 passes",
    "digits": "digits, warm, 120 passes",
    "few samples": "few samples (new), warm, 40 passes",
}
CONDITIONS = {  # on held-out training images
    "CIFAR-100, CNN with 4 features (5 seeds)": "4 features",
    "CIFAR-100, CNN with 8 features (5 seeds)": "8 features, KD searched",
}


def paired(values):
    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    half = STUDENT_T[len(values) - 1] * error
    return [mean, mean - half, mean + half]


def numbers(cell):
    return [float(number) for number in re.findall(r"[+-]?\d+\.\d+", cell)]


def measured(problem):
    """Return KD's accuracy, then the paired differences of DiSK and of one g for all."""
    if problem in MEASURED:
        row = json.loads((ROOT / "examples/results/gain.json").read_text())["rows"][MEASURED[problem]]
        differences = [row["differences"][name]["values"] for name in ("DiSK, default", "UniformGuide, discount auto")]
        return statistics.mean(row["kd"]["test"]), *map(paired, differences)
    if problem in CONDITIONS:
        found = json.loads((ROOT / "examples/results/cifar100_10-l_10-xxs_conditions.json").read_text())
        row = found["conditions"][CONDITIONS[problem]]
        differences = [row["differences"][f"{name} - {row['kd']}"]["values"] for name in ("disk-1", "uniform-1")]
        held_out = [cell["methods"][row["kd"]]["held_out"] for cell in row["cells"]]
        return statistics.mean(held_out), *map(paired, differences)
    lines = (ROOT / "examples/results/gpu/results.jsonl").read_text().splitlines()
    runs = [run for run in map(json.loads, lines) if run["student"] == "resnet10-xxs"]
    kd, disk, uniform = (
        [run["accuracy"] for run in sorted(runs, key=lambda run: run["seed"]) if run["method"] == method]
        for method in ("kd-2", "disk-2", "uniform-2")
    )
    gaps = ([one - other for one, other in zip(found, kd, strict=True)] for found in (disk, uniform))
    return statistics.mean(kd), *map(paired, gaps)


def test_readme_shows_what_was_measured():
    text = (ROOT / "README.md").read_text()
    rows = re.search(r"<!-- summary -->\n(.*?)<!-- /summary -->", text, re.DOTALL)[1].splitlines()[2:]
    assert len(rows) == len(MEASURED) + len(CONDITIONS) + 1
    for row in rows:
        problem, _, *shown = (cell.strip() for cell in row.strip("|").split("|"))
        kd, disk, uniform = measured(problem)
        assert numbers(shown[0]) == pytest.approx([kd], abs=0.006), problem
        assert numbers(shown[1].replace(" to ", " ")) == pytest.approx(disk, abs=0.006), problem
        assert numbers(shown[2].replace(" to ", " ")) == pytest.approx(uniform, abs=0.006), problem
