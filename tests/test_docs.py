"""Code blocks of docs/ run as they stand, around toy models; README's loop is in test_examples.py."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from disk_plugin import DiSKLoss, GuideHead

ROOT = Path(__file__).parents[1]
C = 5


def blocks(name, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


class Shown(nn.Module):
    """Logits and the last map."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, C)

    def forward(self, x):
        last = self.conv(x).relu()
        return self.fc(last.mean((2, 3))), last


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, target = torch.randn(6, 3, 4, 4), torch.arange(6) % C
    return {"torch": torch, "F": F, "SGD": torch.optim.SGD, "x": x, "target": target, "loader": [(x, target)] * 2} | {
        "num_classes": C,
        "epochs": 2,
        "first_epoch": 0,
    }


def test_the_page_on_methods(names):
    method, loop = blocks("docs/write_a_method.md")
    exec(method, names)
    channels = {"student_channels": 4, "teacher_channels": 6}
    exec(loop, names | {"student": Shown(4), "teacher": Shown(6), **channels})


@pytest.mark.filterwarnings("ignore:the guide is dead:UserWarning")
def test_the_page_on_hosts(names):
    names |= {
        "student": nn.Sequential(nn.Flatten(), nn.Linear(48, C)),
        "teacher": nn.Sequential(nn.Flatten(), nn.Linear(48, C)),
    }
    for block in blocks("docs/write_a_host.md"):
        exec(block, names)
    saved = torch.load("checkpoint.pt", weights_only=True)
    assert saved["training"].keys() == {"disk", "method", "dual"}


def test_readmes_lines_on_guided_losses(names):
    (block,) = [block for block in blocks("README.md", "py") if "Guided" in block]
    models = {
        "student": nn.Sequential(nn.Flatten(), nn.Linear(48, C)),
        "teacher": nn.Sequential(nn.Flatten(), nn.Linear(48, C)),
    }
    names |= {**models, "disk": DiSKLoss(GuideHead(C)), "teacher_logits": torch.randn(6, C)}
    exec(block, names)
    names["loss"].backward()
    names["distiller"](names["x"], names["target"]).loss.backward()


def test_links_between_pages_and_files_lead_somewhere():
    for page in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        ROOT / "examples/README.md",
        ROOT / "benchmarks/README.md",
    ]:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            left_out = link.endswith(".png") and not (ROOT / ".git").exists()  # of an sdist
            assert (page.parent / link).exists() or left_out, f"{page.name}: {link}"
