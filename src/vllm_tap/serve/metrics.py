"""Counters of a server, on its `/metrics`. In each API process."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter


class Metrics:
    """Counters of one process; vLLM adds up those of several."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, says: str) -> Counter:
            return Counter(f"vllm_tap_{name}", says, registry=registry)

        self.requests = counter("requests", "Prompts whose capture began.")
        self.completed = counter("completed", "Prompts whose rows are all there.")
        self.failures = counter("failures", "Prompts whose tokens are all there, and their rows are not.")
        self.aborts = counter("aborts", "Prompts whose client left, or that failed.")
        self.rows = counter("rows", "Rows that were kept for their readers.")
        self.bytes = counter("bytes", "Bytes of those rows.")
        self.stalls = counter("stalls", "Prompts that waited for room for their rows in the workers.")
        self.stalled_seconds = counter("stalled_seconds", "Seconds for which they waited, added up.")
        self.refusals = counter("refusals", "Requests that could not be captured.")
        self.reads = counter("reads", "Times that somebody read rows.")
        self.deletes = counter("deletes", "Results that were deleted.")
