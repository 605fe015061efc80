"""The workflows call what is there, on the Pythons that are declared, with no more rights than they need."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.name)
def workflow(request):
    return yaml.safe_load(request.param.read_text())


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_there_are_three_workflows():
    assert {path.stem for path in WORKFLOWS} == {"ci", "docs", "release"}


def test_what_a_workflow_calls_is_there_and_can_be_executed(workflow):
    lines = " ".join(step.get("run", "") for step in steps(workflow))
    for path in re.findall(r"(?:\.ci|tests|examples|benchmarks|disk_plugin)/[\w./]+", lines):
        assert (ROOT / path).is_file(), path
        assert not path.startswith(".ci/") or (ROOT / path).stat().st_mode & 0o111, f"{path} cannot be executed"


def test_every_script_is_called_by_another():
    checks = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    texts = {"ci.yml": " ".join(step.get("run", "") for step in steps(checks))}
    texts |= {path.name: path.read_text() for path in (ROOT / ".ci").iterdir()}
    for name in texts.keys() - {"ci.yml"}:
        assert any(f".ci/{name}" in text for other, text in texts.items() if other != name), name


def test_actions_are_pinned_and_jobs_time_out(workflow):
    for step in steps(workflow):
        assert "uses" not in step or re.search(r"@(?:release/)?v\d+$", step["uses"]), step["uses"]
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_workflows_only_read_but_for_what_they_publish(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    granted = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    expected = {
        "deploy": {"pages": "write", "id-token": "write"},
        "publish": {"id-token": "write"},
    }
    assert granted == {name: expected[name] for name in granted}
    assert not any("secrets." in str(job) for job in workflow["jobs"].values())


def test_the_declared_pythons_are_those_that_are_tested():
    declared = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["newest"]["strategy"]["matrix"]["python"] == declared
