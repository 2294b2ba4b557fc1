"""The old interface as it was recorded, against what is there: names, parameters, order, defaults."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import vllm_tap
from vllm_tap.engine import plugin
from vllm_tap.frame.entry import raw_entry
from vllm_tap.legacy import select

assert vllm_tap.__version__  # it offers vllm.hidden_states

RECORDED = json.loads((Path(__file__).parent / "legacy_signatures.json").read_text())
EASYSTEER = RECORDED["easysteer.hidden_states"]
MODULES = ("easysteer.hidden_states", "vllm.hidden_states")


def described(function: Any) -> dict[str, Any]:
    """Return a signature in the form of the record; self is left out."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    plain = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    result: dict[str, Any] = {
        "parameters": [{"name": p.name} | ({} if p.default is p.empty else {"default": p.default}) for p in plain]
    }
    rest = [p for p in parameters if p not in plain]
    if rest:
        assert [p.kind for p in rest] == [inspect.Parameter.VAR_KEYWORD]
        result["var_keyword"] = rest[0].name
    return result


FUNCTIONS = [(module, name) for module in MODULES for name in RECORDED[module]["functions"]]
# A function may take more than was recorded, after it and with a default.
EXTRA = {"is_moe_layer"}


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_functions_take_what_they_took(module: str, name: str) -> None:
    """Every function of the record is there with its parameters, their order and their defaults."""
    found = described(getattr(importlib.import_module(module), name))
    expected = RECORDED[module]["functions"][name]
    if name in EXTRA:
        found["parameters"] = [{"name": parameter["name"]} for parameter in found["parameters"]]
    assert found == expected


METHODS = [(name, method) for name, kind in EASYSTEER["classes"].items() for method in kind["methods"]]


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_methods_take_what_they_took(name: str, method: str) -> None:
    """Every method of the recorded classes is there with its parameters, their order and their defaults."""
    kind = getattr(importlib.import_module("easysteer.hidden_states"), name)
    assert described(getattr(kind, method)) == EASYSTEER["classes"][name]["methods"][method]


@pytest.mark.parametrize("name", [name for name, kind in EASYSTEER["classes"].items() if "constructor" in kind])
def test_classes_are_made_without_arguments(name: str) -> None:
    """The recorded classes can be made as they were."""
    assert getattr(importlib.import_module("easysteer.hidden_states"), name)() is not None


def test_select_fields_streams_and_keys() -> None:
    """The fields of a select clause, the streams, and the keys of a usage are those of the record."""
    from vllm_tap.legacy import capture_result, experts

    assert list(select.FIELDS) == EASYSTEER["select_fields"]
    assert list(capture_result.STREAMS) == EASYSTEER["capture_streams"]
    assert list(experts.ExpertUsage.__annotations__) == EASYSTEER["analyze_expert_usage_keys"]


def test_worker_calls_are_those_of_the_record() -> None:
    """Every recorded call is a method of the worker's tap that takes no argument, and an entry has the old keys."""
    from vllm_tap.engine.legacy.calls import LegacyCalls

    assert list(plugin.LEGACY_METHODS) == RECORDED["worker_calls"]
    for name in plugin.LEGACY_METHODS:
        assert described(getattr(LegacyCalls, name)) == {"parameters": []}
    assert set(RECORDED["payload_entry_keys"]) <= set(raw_entry(0, "torch.float32", (0,), b""))
