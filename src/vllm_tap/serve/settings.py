"""Settings of the server, from `--additional-config`. In each API process."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from vllm_tap.errors import SpecError
from vllm_tap.spec import Spec

KEY: Final = "vllm_tap_serve"
"""Entry of vLLM's `additional_config`."""


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
    _ = settings.default_spec
    return settings
