"""Every notebook runs top to bottom on a CPU, in a fresh namespace. Its code cells are run as they are, without a kernel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

# The line that says a notebook's own checks came out right.
PROOFS = {"paged_attention": "largest difference: 0.0", "kernels": "every backend is right: True"}
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_top_to_bottom(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), namespace)
    assert PROOFS[path.stem] in capsys.readouterr().out


def test_there_are_some() -> None:
    assert NOTEBOOKS
