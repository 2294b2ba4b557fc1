"""What results say of how they were measured."""

from __future__ import annotations

import pytest

from vllm_tap.bench.machine import describe_command


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["elsewhere/bench/gpu.py", "--models", "elsewhere/models", "--plan", "tp2"], "bench/gpu.py --plan tp2"),
        (["bench/serve_load.py", "--rounds", "3", "--out", "elsewhere/x.json"], "bench/serve_load.py --rounds 3"),
        (
            ["bench/serve_load.py", "--out=elsewhere/x.json", "--model", "models/a b"],
            "bench/serve_load.py --model 'models/a b'",
        ),
    ],
)
def test_a_command_is_told_without_places_of_this_machine(words: list[str], told: str) -> None:
    """As anybody could run it."""
    assert describe_command(words) == told
