"""Settings of the server, from `--additional-config`. In each API process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import msgspec

from vllm_tap.errors import SpecError
from vllm_tap.spec import Spec

KEY: Final = "vllm_tap_serve"
"""Entry of vLLM's `additional_config`."""

LINGER_S: Final = 5.0
"""Seconds for which a capture stays that no request uses: the next one of its Spec then finds it under way."""

FILED: Final = {"hidden_states", "embeddings"}
"""Streams that go into files."""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings under that key. Limits hold in each API process.

    Attributes:
        captures: "allow" or "forbid".
        spec: What is captured of requests that do not say; nothing by default.
        max_results: Results that are kept at a time.
        max_results_per_key: The same, of one API key; 0 for as many as there may be in all.
        max_bytes: Bytes of rows that are kept.
        max_bytes_per_key: The same, of one API key; 0 for as many as there may be in all.
        max_specs: Different Specs that are captured at a time; a GPU engine has room for 8 captures.
        ttl_s: Seconds for which a result is kept after its end.
        budget_bytes: Most memory of the workers for rows of each Spec.
        inline_bytes: Most bytes of a result that goes into the reply itself, as base64; 0 for none.
        hidden_states_folder: Where files of what `spec` captures go, for clients of vLLM's own connector.
    """

    captures: str = "allow"
    spec: dict[str, Any] | None = None
    max_results: int = 4096
    max_results_per_key: int = 0
    max_bytes: int = 1 << 30
    max_bytes_per_key: int = 0
    max_specs: int = 8
    ttl_s: float = 300.0
    budget_bytes: int = 1 << 30
    inline_bytes: int = 0
    hidden_states_folder: str = ""

    @property
    def default_spec(self) -> Spec | None:
        """The Spec of requests that do not say."""
        return None if self.spec is None else Spec.from_json(json.dumps(self.spec))


def read(additional_config: Any) -> Settings:
    """Return the settings in vLLM's `additional_config`.

    Raises:
        SpecError: Something that cannot be.
    """
    given = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
    try:
        settings = msgspec.convert(given, Settings)
    except msgspec.ValidationError as error:
        raise SpecError(f"additional_config[{KEY!r}]: {error}") from None
    if settings.captures not in ("allow", "forbid"):
        raise SpecError(f'additional_config[{KEY!r}]: captures is "allow" or "forbid", got {settings.captures!r}.')
    spec = settings.default_spec
    return _with_folder(settings, spec) if settings.hidden_states_folder else settings


def _with_folder(settings: Settings, spec: Spec | None) -> Settings:
    """Check that a default Spec can go into files, and make their folder."""
    fits = spec is not None and spec.hidden_states is not None and FILED.issuperset(spec.streams)
    if spec is None or not fits or spec.reduce or spec.dtype == "fp8" or spec.positions not in ("prompt", "all"):
        raise SpecError(
            f"additional_config[{KEY!r}]: hidden_states_folder takes a spec of hidden_states, with embeddings or "
            f'without, of positions "prompt" or "all", got {settings.spec}.'
        )
    folder = Path(settings.hidden_states_folder).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"additional_config[{KEY!r}]: hidden_states_folder: {error}") from None
    return msgspec.structs.replace(settings, hidden_states_folder=str(folder))
