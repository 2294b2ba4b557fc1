"""The choice of a codec for a link."""

from __future__ import annotations

import json

import pytest

from vllm_tap import codec
from vllm_tap.codec.choose import RATES, Rates, auto
from vllm_tap.errors import SpecError


@pytest.mark.parametrize("speed", [1.0, 1e8, 1e12])
def test_nothing_is_compressed_within_a_host(speed: float) -> None:
    """On one host the answer is raw, however slow the link is said to be."""
    assert auto(speed, same_host=True) == "raw"


LINKS = [(1e6, "bytesplit"), (1.25e7, "bytesplit"), (1.25e9, "raw"), (1.25e11, "raw")]


@pytest.mark.parametrize(("speed", "name"), LINKS)
def test_slow_links_get_the_best_ratio_and_fast_ones_none(speed: float, name: str) -> None:
    """At 8 and 100 Mbit/s bfloat16 states are split and compressed; at 10 Gbit/s and 1 Tbit/s they stay as they are."""
    assert auto(speed, same_host=False) == name


def test_choice_takes_the_least_time_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a codec that halves the bytes at 1 GB/s each way, the break-even link is 0.25 GB/s, worked out by hand."""
    monkeypatch.setattr("vllm_tap.codec.choose.RATES", {"raw": Rates(1, 1e9, 1e9), "zstd": Rates(2, 1, 1)})
    assert auto(0.24e9, same_host=False) == "zstd"
    assert auto(0.26e9, same_host=False) == "raw"


def test_packages_that_are_missing_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where zstandard is missing, a slow link gets what is there."""
    monkeypatch.setattr(codec, "installed", lambda name: name == "raw")
    assert auto(1e6, same_host=False) == "raw"


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan")])
def test_speed_that_cannot_be_is_refused(speed: float) -> None:
    """A link without a positive speed is an error, not a guess."""
    with pytest.raises(SpecError, match="expected more than 0"):
        auto(speed, same_host=False)


def test_rates_are_those_that_were_measured(pytestconfig: pytest.Config) -> None:
    """The numbers in the code are the medians in the results file, digit for digit."""
    results = json.loads((pytestconfig.rootpath / "bench/results/codecs-cpu.json").read_text())["results"]
    assert {name: rates._asdict() for name, rates in RATES.items()} == {
        name: {field: figures[field] for field in Rates._fields} for name, figures in results.items()
    }
