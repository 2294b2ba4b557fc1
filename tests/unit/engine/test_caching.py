"""How far a captured request reads vLLM's prefix cache, with look-ups that behave and others. Without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_tap.labels import mark
from vllm_tap.vllm.caching import _capped


class Coordinator:
    """Knows the first 100 tokens of everything, in blocks of 8; or does not look at how many are wanted."""

    def __init__(self, obeys: bool = True) -> None:
        self.obeys = obeys

    def find_longest_cache_hit(self, block_hashes: Any, longest: int) -> int:
        """Return the number of cached tokens."""
        return min(100, longest if self.obeys else 100) // 8 * 8


def look_up(manager: Any, request: Any, longest: int | None = None) -> tuple[str, int, int]:
    """Do as vLLM does: skip the cache where a request says so."""
    if request.skip_reading_prefix_cache:
        return "none", 0, 0
    return "some", manager.coordinator.find_longest_cache_hit([], longest or request.num_prompt_tokens - 1), 0


def request(extra: Any, skips: bool = True, prompt_len: int = 90) -> Any:
    """A request of so many tokens."""
    params = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(skip_reading_prefix_cache=skips, num_prompt_tokens=prompt_len, sampling_params=params)


@pytest.mark.parametrize(
    ("extra", "skips", "cached"),
    [
        (None, True, 0),
        (None, False, 88),
        (mark("a", 0), True, 0),
        (mark("a", 0, 1, None, (2**31 - 1, 20)), True, 64),
        (mark("a", 0, 1, "last", (33, -1)), True, 32),
        (mark("a", 0, 1, None, (33, 80)), True, 8),
        (mark("a", 0, 1, None, (33, 200)), True, 0),
        (mark("a", 0, 1, None, (2**31 - 1, 20)), False, 88),
        ({"vllm_tap": ["a", 0, 1, None, ["x", 1]]}, True, 0),
    ],
)
def test_it_is_read_up_to_the_first_wanted_position(extra: Any, skips: bool, cached: int) -> None:
    """In whole blocks; a request is as it was before, and so is the look-up of others."""
    manager = SimpleNamespace(coordinator=Coordinator())
    asked = request(extra, skips)
    assert _capped(look_up)(manager, asked)[1] == cached
    assert asked.skip_reading_prefix_cache is skips
    assert _capped(look_up)(manager, asked, 50)[1] == min(cached, 48)
    assert "find_longest_cache_hit" not in vars(manager.coordinator)


def test_a_look_up_that_goes_further_is_not_believed() -> None:
    """Nor is one without the names that are needed: the request skips the cache, and no row is lost."""
    asked = request(mark("a", 0, 1, None, (33, -1)))
    assert _capped(look_up)(SimpleNamespace(coordinator=Coordinator(obeys=False)), asked)[1] == 0
    assert _capped(look_up)(SimpleNamespace(coordinator=object()), asked)[1] == 0


def test_embeddings_and_strange_requests_are_left_alone() -> None:
    """Those without sampling parameters, or that are something else."""
    manager = SimpleNamespace(coordinator=Coordinator())
    pooling = SimpleNamespace(skip_reading_prefix_cache=True, num_prompt_tokens=90, sampling_params=None)
    assert _capped(look_up)(manager, pooling)[1] == 0
