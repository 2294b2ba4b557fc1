"""Source trees side by side, the rows of bench/gpu_table.py, and the layouts of bench/gpu_document.py."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, as a module that is no part of a package."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    before = set(sys.modules)
    import gpu_table

    yield gpu_table
    for name in set(sys.modules) - before:
        if name.startswith("gpu"):
            sys.modules.pop(name)


def test_a_tree_that_is_laid_out_runs_instead_of_what_is_installed(table: ModuleType, tmp_path: Path) -> None:
    """Its modules are imported, and vLLM would find its plugin by the entry point of its own pyproject.toml."""
    tree, site = tmp_path / "tree", tmp_path / "site"
    (tree / "src/vllm_tap").mkdir(parents=True)
    (tree / "src/vllm_tap/__init__.py").write_text("IS_OTHER = True\n")
    (tree / "pyproject.toml").write_text(
        '[project]\nname = "vllm-tap"\nversion = "0.0.1"\n[project.entry-points."vllm.general_plugins"]\n'
        'vllm_tap = "vllm_tap.elsewhere:register"\n'
    )
    table.lay_out(tree, site)
    (found,) = importlib.metadata.distributions(path=[str(site)])
    assert [(point.name, point.value) for point in found.entry_points] == [("vllm_tap", "vllm_tap.elsewhere:register")]
    program = (
        "import vllm_tap, importlib.metadata as m\n"
        "(point,) = [p for p in m.entry_points(group='vllm.general_plugins') if p.name == 'vllm_tap']\n"
        "print(vllm_tap.IS_OTHER, point.value)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert done.stdout == "True vllm_tap.elsewhere:register\n", done.stderr


def test_this_tree_can_be_laid_out(table: ModuleType, tmp_path: Path) -> None:
    table.lay_out(ROOT, tmp_path)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert {point.group for point in found.entry_points} >= {"vllm.general_plugins"}
    assert (tmp_path / "vllm_tap/__init__.py").is_file()


def test_a_row_names_its_rounds_and_their_spread(table: ModuleType) -> None:
    times = {"plain": [1.0, 1.0, 1.0, 1.0], "new: all layers": [1.0, 1.25, 2.0, 1.0]}
    row = table.row_of(table.GROUPS[0], "decode", "new: all layers", times, 7)
    assert (row["rounds"], row["bytes"], row["quartiles"]) == (4, 7, [0.8, 1.0])
    assert row["ratio"] == pytest.approx(1 / 1.125)
    assert row["paired"] == pytest.approx(0.9)
    assert row["beyond_plain_ms"][0] == pytest.approx(312.5)


@pytest.mark.parametrize(
    ("num_gpus", "names"),
    [
        (1, ["1 GPU"]),
        (2, ["TP 2", "PP 2", "DP 2", "1 GPU"]),
        (4, ["TP 4", "TP 2 x PP 2", "TP 2 x DP 2", "TP 2", "1 GPU"]),
    ],
)
def test_layouts_fit_the_gpus(table: ModuleType, num_gpus: int, names: list[str]) -> None:
    import gpu_document

    layouts = gpu_document.layouts(num_gpus, [1, 2, 4])
    assert [layout.name for layout in layouts] == names
    assert max(layout.num_gpus for layout in layouts) <= num_gpus
