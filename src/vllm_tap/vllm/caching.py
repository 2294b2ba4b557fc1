"""The prefix cache of vLLM for captured requests: read up to the first position whose row is wanted. Engine core.

A client tells such a request to skip the cache, which holds where this hook does not; its mark says how far it may be
read after all. The length of the prompt is known here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_tap.labels import read_mark
from vllm_tap.positions import Begin


def install() -> None:
    """Hook into vLLM's look-up; without the names that are needed captured requests skip the cache."""
    try:
        from vllm.v1.core.kv_cache_manager import KVCacheManager
    except ImportError:
        return
    look_up = getattr(KVCacheManager, "get_computed_blocks", None)
    if look_up is not None and not hasattr(look_up, "vllm_tap"):
        KVCacheManager.get_computed_blocks = _capped(look_up)
        KVCacheManager.get_computed_blocks.vllm_tap = True


def _capped(look_up: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(look_up)
    def get_computed_blocks(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        plain = functools.partial(look_up, self, request, *args, **kwargs)
        most = _most_cached(request)
        if not most or not hasattr(self.coordinator, "find_longest_cache_hit"):
            return plain()
        found = _look_up_to(plain, self.coordinator, request, most)
        return found if found[1] <= most else plain()

    return get_computed_blocks


def _look_up_to(look_up: Callable[[], Any], coordinator: Any, request: Any, most: int) -> Any:
    """Look up as for a request that reads the cache, no further than so many tokens."""
    find = coordinator.find_longest_cache_hit

    def find_up_to(block_hashes: Any, longest: int, *args: Any, **kwargs: Any) -> Any:
        return find(block_hashes, min(longest, most), *args, **kwargs)

    coordinator.find_longest_cache_hit = find_up_to
    request.skip_reading_prefix_cache = False
    try:
        return look_up()
    finally:
        request.skip_reading_prefix_cache = True  # also of what a connector holds: its hits have no bound
        del coordinator.find_longest_cache_hit


def _most_cached(request: Any) -> int:
    """Return how many tokens a request that skips the cache may take from it."""
    if not getattr(request, "skip_reading_prefix_cache", False):
        return 0
    mark = read_mark(getattr(getattr(request, "sampling_params", None), "extra_args", None))
    if mark is None or mark.reads_cache is None:
        return 0
    return Begin(*mark.reads_cache).of(request.num_prompt_tokens)
