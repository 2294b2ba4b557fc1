"""Time datasets against the disk: writing, opening, the first row, single rows, shuffled epochs.

`python -m vllm_tap.bench.store [--gib N] [--folder PATH] [--out FILE]` runs in one process. Every figure stands beside
one of plain files of the same size in the same folder and run; reads are of pages that the system holds.
"""

from __future__ import annotations

import argparse
import functools
import json
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch

from vllm_tap.bench.machine import describe_machine
from vllm_tap.client.sequences import Sequences
from vllm_tap.spec import Spec
from vllm_tap.store import writer
from vllm_tap.store.dataset import Dataset, open_dataset
from vllm_tap.store.facts import facts_of
from vllm_tap.store.places import place_of

WIDTH: Final = 4096
LAYERS: Final = (8, 16, 24, 31)
ROW_BYTES: Final = 2 * WIDTH
TOKENS: Final = 512
PART_BYTES: Final = 1 << 28
CHUNK_BYTES: Final = writer.CHUNK_BYTES
NUM_SINGLE: Final = 20_000
BATCH: Final = 4096


class Rows:
    """Hidden states of as many sequences of `TOKENS` tokens as fill a part, views of one block of memory."""

    def __init__(self, num_sequences: int) -> None:
        self.spec = Spec(hidden_states=list(LAYERS))
        self.layers, self.num_layers, self.has_final_norm = {"hidden_states": list(LAYERS)}, 32, True
        self.conventions = {"hidden_states": "random numbers"}
        self.routing: dict[int, Any] = {}
        ids = list(range(TOKENS))
        output = SimpleNamespace(request_id="0", prompt=None, prompt_token_ids=ids, outputs=None)
        self.outputs = [output] * num_sequences
        self.sequences = Sequences(self.outputs, "all")
        generator = torch.Generator().manual_seed(0)
        self._block = torch.randn(num_sequences * TOKENS, WIDTH, generator=generator).to(torch.bfloat16)

    def rows(self, stream: str, layer: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows; of all layers the same ones."""
        return self._block[start:stop]


def seconds_of(function: Callable[[], Any], rounds: int = 1) -> float:
    """Return the median time of a function."""
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def write_plain(folder: Path, source: Rows, part: int) -> None:
    """Write the same bytes as one part into plain files, one for each layer, in the same pieces; and sync them."""
    data = source.rows("", 0).view(torch.uint8).numpy().reshape(-1)
    for layer in LAYERS:
        with open(folder / f"{part}.{layer}", "wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, len(data))
            for start in range(0, len(data), CHUNK_BYTES):
                file.write(data[start : start + CHUNK_BYTES].data)
            os.fsync(file.fileno())


def bench_write(root: Path, num_parts: int, source: Rows) -> tuple[dict[str, Any], Dataset]:
    """Write a dataset and plain files, part by part in turn, so that both meet the same disk."""
    plain = root / "plain"
    plain.mkdir()
    place = place_of(root / "run")
    facts = facts_of(source, {"name": "random"}, "", {})
    pairs = []
    for part in range(num_parts):
        first = part * len(source.outputs)
        theirs = seconds_of(functools.partial(write_plain, plain, source, part))
        ours = seconds_of(functools.partial(writer.write_part, place, source, facts, first_sample=first))
        pairs.append((ours, theirs))
    dataset = open_dataset(root / "run")
    gigabytes = len(LAYERS) * dataset.num_rows * ROW_BYTES / 1e9
    return {
        "gigabytes": gigabytes,
        "write_gb_per_s": gigabytes / sum(ours for ours, _ in pairs),
        "plain_write_gb_per_s": gigabytes / sum(theirs for _, theirs in pairs),
        "write_ratio": statistics.median(theirs / ours for ours, theirs in pairs),
    }, dataset


def bench_open(path: str) -> dict[str, float]:
    """Open a dataset and read a row, as one that has just been started does."""

    def first() -> None:
        open_dataset(path)[3].hidden_states[LAYERS[-1]][0].clone()

    opened = seconds_of(lambda: open_dataset(path), 9)
    return {"open_ms": 1e3 * opened, "open_and_first_row_ms": 1e3 * seconds_of(first, 9)}


def bench_rows(dataset: Dataset, plain: Path, num_parts: int) -> dict[str, float]:
    """Read single rows at random, through the dataset and through maps of the plain files: each copied."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, dataset.num_rows, NUM_SINGLE).tolist()
    per_part = dataset.num_rows // num_parts
    maps = []
    for part in range(num_parts):
        with open(plain / f"{part}.{LAYERS[0]}", "rb") as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
        maps.append(torch.from_numpy(data).view(torch.bfloat16).view(-1, WIDTH))
    rows, out = dataset.rows("hidden_states", LAYERS[0]), torch.empty(WIDTH, dtype=torch.bfloat16)

    def ours() -> None:
        for number in numbers:
            out.copy_(rows[number])

    def theirs() -> None:
        for number in numbers:
            part, row = divmod(number, per_part)
            out.copy_(maps[part][row])

    def gathered() -> None:
        for start in range(0, NUM_SINGLE, BATCH):
            rows.take(numbers[start : start + BATCH])

    for function in (theirs, ours):
        function()  # both have met all pages
    found = {"rows_per_s": NUM_SINGLE / seconds_of(ours, 5), "plain_rows_per_s": NUM_SINGLE / seconds_of(theirs, 5)}
    found["rows_ratio"] = found["rows_per_s"] / found["plain_rows_per_s"]
    return {**found, "gathered_rows_per_s": NUM_SINGLE / seconds_of(gathered, 5)}


def bench_epoch(dataset: Dataset) -> dict[str, float]:
    """Read one layer in shuffled batches, and in the rows' own order."""
    nbytes = dataset.num_rows * ROW_BYTES
    taken: dict[str, float] = {}
    for name, seed in (("sequential", None), ("shuffled", 0), ("sequential", None), ("shuffled", 1)):
        batches = dataset.batches("hidden_states", LAYERS[1], batch_size=BATCH, seed=seed)
        taken[name] = seconds_of(lambda batches=batches: [None for _ in batches])  # type: ignore[misc]
    return {
        "sequential_gb_per_s": nbytes / taken["sequential"] / 1e9,
        "shuffled_gb_per_s": nbytes / taken["shuffled"] / 1e9,
        "shuffled_ratio": taken["sequential"] / taken["shuffled"],
    }


def run(gib: float, root: Path) -> dict[str, Any]:
    """Run all of it in a folder."""
    source = Rows(PART_BYTES // (TOKENS * ROW_BYTES * len(LAYERS)))
    num_parts = max(int(gib * 2**30) // PART_BYTES, 2)
    written, dataset = bench_write(root, num_parts, source)
    return {
        **written,
        "parts": num_parts,
        **bench_open(dataset.path),
        **bench_rows(dataset, root / "plain", num_parts),
        **bench_epoch(dataset),
    }


def main() -> None:
    """Run the benchmark and print or write its results."""
    parser = argparse.ArgumentParser(prog="python -m vllm_tap.bench.store", description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4, help="size of the dataset; as much again for the plain files")
    parser.add_argument("--folder", type=Path, help="where to write; by default the folder for temporary files")
    parser.add_argument("--out", type=Path, help="results file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        found = run(options.gib, root)
    finally:
        shutil.rmtree(root)
    command = f"python -m vllm_tap.bench.store --gib {options.gib:g}"
    results = {"benchmark": "store", "command": command, "machine": describe_machine(), **found}
    print(json.dumps(results, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
