"""Configurations of vLLM in which rows cannot be told apart are refused by name. Needs no vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_tap.errors import EngineUnsupportedError
from vllm_tap.vllm.model import _refuse_config


def config(section: str = "", **settings: Any) -> Any:
    """Return a configuration of vLLM in which nothing is in the way but these settings."""
    sections = {
        "parallel_config": SimpleNamespace(),
        "cache_config": SimpleNamespace(),
        "compilation_config": SimpleNamespace(pass_config=SimpleNamespace()),
        "speculative_config": None,
    }
    if section:
        sections[section] = SimpleNamespace(**settings)
    return SimpleNamespace(**sections)


def test_a_plain_configuration_is_accepted():
    """Nothing is in the way; neither is speculative decoding as such."""
    _refuse_config(config())
    _refuse_config(config("speculative_config", enable_adaptive_verification=False))


@pytest.mark.parametrize(
    ("section", "settings", "words"),
    [
        ("parallel_config", {"enable_dbo": True}, "enable_dbo"),
        ("parallel_config", {"num_ubatches": 2}, "microbatching"),
        ("parallel_config", {"use_sequence_parallel_moe": True}, "sequence-parallel experts.*over ranks"),
        ("parallel_config", {"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ("cache_config", {"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ("compilation_config", {"pass_config": SimpleNamespace(enable_sp=True)}, "enable_sp"),
        ("speculative_config", {"enable_adaptive_verification": True}, "enable_adaptive_verification"),
    ],
)
def test_what_mixes_rows_up_is_refused(section, settings, words):
    """The message names the setting and says to turn it off."""
    with pytest.raises(EngineUnsupportedError, match=f"{words}.*turn it off"):
        _refuse_config(config(section, **settings))
