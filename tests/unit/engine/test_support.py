"""The list of what is assumed of vLLM: complete, true of the vLLM that is installed, and on the page as it stands."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_tap.errors import EngineUnsupportedError
from vllm_tap.vllm import assumptions, experts, facts, hooks, model, runner, support

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "vllm-support.md"
BOUNDS = "{}.{} to {}.{}".format(*facts.OLDEST, *facts.NEWEST)
LISTED = {name for part in assumptions.PARTS for entry in part.assumptions for name in entry.names}


def test_the_page_is_up_to_date() -> None:
    """What is rendered now is what the repository has."""
    assert PAGE.read_text() == support.render()


def test_a_stale_page_fails_the_check(tmp_path: Path) -> None:
    """The command that `make check` runs fails for another page or none, and writes only without --check."""
    page = tmp_path / "page.md"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vllm_tap.vllm.support", str(page), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    for text in (None, "old"):
        if text is not None:
            page.write_text(text)
        done = run("--check")
        assert done.returncode == 1
        assert f"{page} is out of date: run python -m vllm_tap.vllm.support {page}" in done.stderr
    assert page.read_text() == "old"
    assert run().returncode == run("--check").returncode == 0
    assert page.read_text() == PAGE.read_text()


def test_the_installed_vllm_has_what_is_assumed() -> None:
    """Each name is in the source of the installed vLLM, at the place that the page says."""
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    assert support.missing(Path(found.origin).parents[1]) == []


def test_a_tree_without_a_name_is_told(tmp_path: Path) -> None:
    """Names are found as methods, fields, attributes of self and imports; what is not there is named by its place."""
    worker = tmp_path / "vllm" / "v1" / "worker" / "worker_base.py"
    worker.parent.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("from .version import __version__\n")
    worker.write_text(
        "class WorkerBase:\n    device: str\n    rank = 0\n    def load_model(self): self.model_runner = 1\n"
        "class WorkerWrapperBase:\n    def init_device(self): self.worker: WorkerBase = None\n"
    )
    absent = support.missing(tmp_path)
    assert [name for name in absent if "worker_base" in name] == ["vllm.v1.worker.worker_base.WorkerBase.vllm_config"]
    assert "vllm.__version__" not in absent
    assert "vllm.engine.arg_utils.EngineArgs.create_engine_config" in absent


def test_names_are_looked_for_in_the_versions_that_have_them(tmp_path: Path) -> None:
    """A name that a version is not listed with is not missed in it."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "_version.py").write_text("__version__ = version = '0.26.0+cpu'\n")
    absent = support.missing(tmp_path)
    assert not [name for name in absent if "CPURouter" in name]
    assert "vllm.config.compilation.PassConfig.enable_sp" in absent


def test_every_name_that_host_looks_for_is_listed() -> None:
    """What `host` and `experts` ask for by a literal name, with `require`, `getattr` or `hasattr`, is in the list."""
    asked = {
        node.args[1].value
        for module in (facts, hooks, model, runner, experts)
        for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("require", "getattr", "hasattr")
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
    }
    ours = {"vllm_tap", "vllm_tap_open"}
    of_models = {"start_layer", "end_layer", "num_hidden_layers", "hidden_size"}
    assert asked - LISTED - ours - of_models == set()
    assert set(experts.OTHER_WAYS) <= LISTED


def test_a_missing_name_is_refused_with_its_reason() -> None:
    """The error names the class, the attribute, what it is for and the versions that are known."""
    expected = rf"has no .*object.execute_model, which is needed to see the steps. .*vLLM {re.escape(BOUNDS)}"
    with pytest.raises(EngineUnsupportedError, match=expected):
        facts.require(object(), "execute_model")


def test_a_missing_field_is_refused_before_a_step_runs() -> None:
    """Fields of requests are looked for when the model is loaded: all are there, and another one is named."""
    facts.require_fields([*assumptions.REQUESTS, assumptions.V2_ROWS])
    absent = assumptions.REQUESTS[1]._replace(names=("req_id", "execute_model"))
    with pytest.raises(EngineUnsupportedError, match=r"vllm.v1.core.sched.output.NewRequestData.execute_model"):
        facts.require_fields([absent])


def test_versions_agree() -> None:
    """The bounds that `facts` refuses by are those of the versions that were read, and of the documents."""
    bounds = [tuple(map(int, re.findall(r"\d+", version)[:2])) for version in assumptions.VERSIONS]
    assert (min(bounds), max(bounds)) == (facts.OLDEST, facts.NEWEST)
    pages = [ROOT / "README.md", ROOT / "docs" / "support.md"]
    assert [page.name for page in pages if BOUNDS not in page.read_text()] == []
