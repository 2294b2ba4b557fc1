"""Identity of an engine's model, as datasets keep it. Client process."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

from vllm_tap import __version__


def model_facts(llm: Any) -> dict[str, str]:
    """Return name, revision and dtype of a model."""
    fields = {"name": "model", "revision": "revision", "dtype": "dtype"}
    named = {name: getattr(llm.model_config, field, None) for name, field in fields.items()}
    return {name: str(value).removeprefix("torch.") for name, value in named.items() if value is not None}


def full_model_facts(llm: Any) -> dict[str, str]:
    """Return what `model_facts` does, and digests of the configuration and, of a fast one, the tokenizer."""
    return {**model_facts(llm), **_config(llm), **_tokenizer(llm)}


def versions() -> dict[str, str]:
    """Return the versions of what captures rows in this process."""
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in ("vllm", "torch")}
    return {"vllm_tap": __version__, **{name: str(version) for name, version in loaded.items() if version}}


def _config(llm: Any) -> dict[str, str]:
    config = llm.model_config.hf_config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    text = json.dumps(config, sort_keys=True, default=str)
    return {"config_sha256": hashlib.sha256(text.encode()).hexdigest()}


def _tokenizer(llm: Any) -> dict[str, str]:
    if getattr(llm.model_config, "skip_tokenizer_init", False):
        return {}
    backend = getattr(llm.get_tokenizer(), "backend_tokenizer", None)
    if backend is None:
        return {}
    return {"tokenizer_sha256": hashlib.sha256(backend.to_str().encode()).hexdigest()}
