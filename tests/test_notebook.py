"""The notebook of the quickstart: every cell runs, and what is committed came of a run and names no machine."""

import json
import re

import nbformat
import pytest
from execute_notebook import METADATA, NOTEBOOK, execute
from nbclient.exceptions import CellExecutionError

pytestmark = pytest.mark.filterwarnings("ignore")  # of the kernel's libraries


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_cell_runs(committed):
    ran = execute(fast=True)
    assert [cell.source for cell in ran.cells] == [cell.source for cell in committed.cells]
    assert all(cell.execution_count for cell in code(ran))


def test_a_cell_that_raises_fails_the_execution(tmp_path):
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")], metadata=METADATA)
    nbformat.write(broken, tmp_path / "broken.ipynb")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(tmp_path / "broken.ipynb", fast=True)


def test_the_committed_outputs_are_of_one_run(committed):
    assert [cell.execution_count for cell in code(committed)] == [*range(1, len(code(committed)) + 1)]
    outputs = [output for cell in code(committed) for output in cell.outputs]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") == 4  # the digits, the comparison, the guide, the gallery
    assert "text/html" in kinds  # the table
    (verdict,) = (output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {}))
    assert "beside one g for all samples" in verdict


def test_the_committed_verdict_follows_from_the_committed_table(committed):
    text = json.dumps(committed)
    (table,) = re.findall(r"DiSK +[\d.]+ +([+-][\d.]+ \([+-][\d.]+ to [+-][\d.]+\))", text)
    assert f"KD, {table};" in text or f"apart, {table};" in text


def test_the_notebook_names_no_machine_and_is_small(committed):
    text = NOTEBOOK.read_text()
    assert len(text) < 300_000
    assert not re.findall(r"/(?:home|root|tmp|Users|usr|opt|work)/|[A-Z]:\\\\", text)
    assert committed.metadata == METADATA
    assert all(cell.metadata == {} for cell in committed.cells)


def test_links_lead_somewhere(committed):
    text = "".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert links
    for link in links:
        assert (NOTEBOOK.parent / link).exists(), link
