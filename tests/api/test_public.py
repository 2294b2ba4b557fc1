"""What users import, and what importing it loads."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vllm_tap
import vllm_tap.errors

ROOT = Path(__file__).resolve().parents[2]


def fresh(code: str) -> str:
    """Run code in a new interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def errors_of_this_package() -> list[str]:
    """Return the names of all exceptions that are raised on purpose."""
    return [name for name, kind in vars(vllm_tap.errors).items() if isinstance(kind, type) and name.endswith("Error")]


def test_public_names() -> None:
    """These names are the package's promise; a change here is a change for users."""
    errors = sorted(errors_of_this_package())
    others = [
        *("AsyncTap", "Capture", "Dataset", "DatasetWriter", "HttpTap", "LayerMap", "Positions", "Recording"),
        *("RowBlock", "RowLabels", "Sample", "Spec", "Spill", "Stream", "Tap", "__version__", "capture"),
        *("open_dataset", "record", "shutdown"),
    ]
    assert vllm_tap.__all__ == sorted(errors + others)
    assert dir(vllm_tap) == vllm_tap.__all__
    for name in vllm_tap.__all__:
        assert getattr(vllm_tap, name) is not None


def test_capture_takes_these_arguments() -> None:
    """The signature of `capture` is public: names, order and defaults."""
    parameters = inspect.signature(vllm_tap.capture).parameters.values()
    required = inspect.Parameter.empty
    assert {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD} == {
        "llm": required,
        "prompts": required,
        "spec": required,
    }
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == {
        "transport": "auto",
        "budget_bytes": None,
        "staging": "auto",
        "on_full": "fail",
        "progress": None,
        "lora_request": None,
        "sampling_params": None,
    }


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        ("Capture", "conventions first_sample has_experts has_final_norm layers model num_bytes num_rows outputs "
                    "routing row_labels rows sample save seconds spec"),
        ("Sample", "as_hf attention_output embeddings expert_ids expert_weights final_hidden_states hidden_states "
                   "last_hidden_state mlp_output positions routed_experts router_logits token_ids"),
        ("Dataset", "batches conventions facts layers num_bytes num_rows path record routing rows sample sequences "
                    "spec table where"),
    ],
)  # fmt: skip
def test_public_attributes(owner: str, names: str) -> None:
    """What a result offers is there by these names, as attributes or in the class's documentation."""
    kind = getattr(vllm_tap, owner)
    documented = inspect.getdoc(kind) or ""
    missing = [name for name in names.split() if not hasattr(kind, name) and f"{name}:" not in documented]
    assert missing == []


def test_samples_of_datasets_have_what_captured_ones_have() -> None:
    """A program that reads samples of a capture reads those of a dataset."""
    from vllm_tap.store.sample import Sample

    captured = {name for name in vars(vllm_tap.Sample) if not name.startswith("_")}
    documented = inspect.getdoc(Sample) or ""
    assert [name for name in captured if not hasattr(Sample, name) and f"{name}:" not in documented] == []


def test_record_takes_these_arguments() -> None:
    """The signature of `record` is public: names, order and defaults."""
    parameters = inspect.signature(vllm_tap.record).parameters.values()
    required = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert required == ["llm", "prompts", "spec", "path"]
    mine = {"resume": False, "batch": 256, "metadata": None, "share": (0, 1), "on_part": None, "writers": "auto"}
    given = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    theirs = inspect.signature(vllm_tap.capture).parameters.values()
    assert given == {**mine, **{p.name: p.default for p in theirs if p.kind is p.KEYWORD_ONLY}}


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A wrong name fails as in any module, so that `hasattr` and import hints work."""
    with pytest.raises(AttributeError, match="no attribute 'capturee'"):
        vllm_tap.capturee  # noqa: B018


@pytest.mark.parametrize(
    "code", ["import vllm_tap", "from vllm_tap import Dataset, open_dataset",
             "from vllm_tap import Spec, TapError; Spec(hidden_states='all')", "import vllm_tap.cli",
             "import vllm_tap.engine.plugin", "import vllm_tap.legacy.install"]
)  # fmt: skip
def test_importing_is_light(code: str) -> None:
    """Importing the package, a `Spec`, the command line or the plugin loads neither torch nor vLLM."""
    loaded = fresh(f"import sys, json\n{code}\nprint(json.dumps(sorted(m.partition('.')[0] for m in sys.modules)))")
    assert not {"torch", "vllm", "transformers"} & set(json.loads(loaded))


def test_importing_starts_and_reads_nothing() -> None:
    """Importing neither starts a thread nor looks at the environment."""
    code = """
import os, threading
class Watched(dict):
    def __getitem__(self, key): raise SystemExit(f"read {key}")
    get = __getitem__
import msgspec, numpy  # what these do is theirs
os.environ = Watched()
import vllm_tap
print(threading.active_count())
"""
    assert fresh(code).strip() == "1"


def test_versions_agree() -> None:
    """The package, its metadata and pyproject.toml name one version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert vllm_tap.__version__ == project["version"] == importlib.metadata.version("vllm-tap")


def test_the_plugin_is_registered() -> None:
    """vLLM finds the package by its entry point, and calling that does no harm outside vLLM's processes."""
    (entry,) = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "vllm_tap"]
    assert entry.value == "vllm_tap.engine.plugin:register"
    assert callable(entry.load())
