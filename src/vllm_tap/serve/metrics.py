"""Counters of a server, on its `/metrics`. In each API process."""

from __future__ import annotations

from prometheus_client import Counter


class Metrics:
    """Counters of one process; vLLM adds up those of several."""

    def __init__(self) -> None:
        self.requests = Counter("vllm_tap_requests", "Prompts that were captured.")
        self.rows = Counter("vllm_tap_rows", "Rows that were kept for their readers.")
        self.bytes = Counter("vllm_tap_bytes", "Bytes of those rows.")
        self.refusals = Counter("vllm_tap_refusals", "Requests that could not be captured.")
        self.failures = Counter("vllm_tap_failures", "Captures that ended early.")
        self.reads = Counter("vllm_tap_reads", "Times that somebody read rows.")
        self.deletes = Counter("vllm_tap_deletes", "Results that were deleted.")
