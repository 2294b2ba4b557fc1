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
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import msgspec
import numpy as np
import torch

from vllm_tap.bench.machine import describe_commit, describe_machine
from vllm_tap.client.sequences import Sequences
from vllm_tap.spec import Spec
from vllm_tap.store import index, manifest, shard, writer
from vllm_tap.store.dataset import Dataset, open_dataset
from vllm_tap.store.facts import facts_of
from vllm_tap.store.files import CHUNK_BYTES
from vllm_tap.store.manifest import FileFacts
from vllm_tap.store.place import part_name
from vllm_tap.store.places import place_of
from vllm_tap.store.source import ShardWriter, labels_of, texts_of

WIDTH: Final = 4096
LAYERS: Final = (8, 16, 24, 31)
ROW_BYTES: Final = 2 * WIDTH
TOKENS: Final = 512
PART_BYTES: Final = 1 << 28
LARGE_BYTES: Final = 20 * 10**9
"""Size of the dataset that is opened; its parts are names of the files of one of them."""
NUM_SINGLE: Final = 20_000
BATCH: Final = 4096


class Rows:
    """Hidden states of as many sequences of `TOKENS` tokens as fill a part, views of one block of memory."""

    shard_writer: ShardWriter | None = None

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


def make_large(root: Path, source: Rows) -> Path:
    """Make a dataset of `LARGE_BYTES`: one part's shards, linked into all others, which have labels of their own."""
    folder, count = root / "large", len(source.outputs)
    place, facts = place_of(folder), facts_of(source, {"name": "random"}, "", {})
    sealed = writer.write_part(place, source, facts)
    first = folder / part_name(0)
    for number in range(1, -(-LARGE_BYTES // sum(file.nbytes for file in sealed.files))):
        draft = folder / part_name(number * count)
        draft.mkdir()
        labels = labels_of(source, number * count)
        head = shard.label_header(len(labels.samples), len(labels.positions))
        own = {
            manifest.LABELS_NAME: head + b"".join(array.tobytes() for array in labels),
            manifest.INDEX_NAME: index.encode(labels, texts_of(source, None)).tobytes(),
        }
        files = {file.name: file for file in sealed.files}
        for name, data in own.items():
            (draft / name).write_bytes(data)
            files[name] = FileFacts(name=name, nbytes=len(data), crc32=zlib.crc32(data))
        for name in files.keys() - own.keys():
            os.link(first / name, draft / name)
        stated = msgspec.structs.replace(sealed, first_sample=number * count, files=tuple(sorted(files.values())))
        (draft / manifest.NAME).write_bytes(manifest.encode(stated))
    return folder


def forget_pages(folder: Path) -> None:
    """Have the system let go of what it holds of the files of a dataset, as far as the disk has them."""
    for path in folder.glob("*/*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def bench_open(folder: Path) -> dict[str, float]:
    """Open a dataset and read a row, with its pages in memory and without; in one process, which has the modules."""
    opened: dict[str, list[float]] = {}
    kinds = ("warm",) if folder.is_relative_to("/dev/shm") else ("cold", "warm")
    for _ in range(9):
        for kind in kinds:
            if kind == "cold":
                forget_pages(folder)
            begin = time.perf_counter()
            dataset = open_dataset(folder)
            middle = time.perf_counter()
            dataset[len(dataset) // 2].hidden_states[LAYERS[-1]][0].clone()
            end = time.perf_counter()
            opened.setdefault(f"open_{kind}_ms", []).append(1e3 * (middle - begin))
            opened.setdefault(f"first_row_{kind}_ms", []).append(1e3 * (end - middle))
    return {name: statistics.median(values) for name, values in opened.items()}


def map_plain(path: Path) -> torch.Tensor:
    """Map a plain file of rows."""
    with open(path, "rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
    return torch.from_numpy(data).view(torch.bfloat16).view(-1, WIDTH)


def bench_rows(dataset: Dataset, plain: Path, num_parts: int) -> dict[str, float]:
    """Read single rows at random, through the dataset and through maps of the plain files: each copied."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, dataset.num_rows, NUM_SINGLE).tolist()
    per_part = dataset.num_rows // num_parts
    maps = [map_plain(plain / f"{part}.{LAYERS[0]}") for part in range(num_parts)]
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


def bench_epoch(dataset: Dataset, plain: Path, num_parts: int) -> dict[str, float]:
    """Read one layer in shuffled batches, and plain files in order: each batch a copy."""
    nbytes = dataset.num_rows * ROW_BYTES
    maps = [map_plain(plain / f"{part}.{LAYERS[1]}") for part in range(num_parts)]

    def shuffled(seed: int) -> None:
        for _ in dataset.batches("hidden_states", LAYERS[1], batch_size=BATCH, seed=seed):
            pass

    def sequential() -> None:
        for rows in maps:
            for batch in rows.split(BATCH):
                batch.clone()

    pairs = []
    for seed in range(4):
        pairs.append((seconds_of(functools.partial(shuffled, seed)), seconds_of(sequential)))
    ours, theirs = zip(*pairs[1:], strict=True)  # the first ones meet the pages
    return {
        "sequential_gb_per_s": nbytes / statistics.median(theirs) / 1e9,
        "shuffled_gb_per_s": nbytes / statistics.median(ours) / 1e9,
        "shuffled_ratio": statistics.median(their / our for our, their in pairs[1:]),
    }


def run(gib: float, root: Path) -> dict[str, Any]:
    """Run all of it in a folder."""
    source = Rows(PART_BYTES // (TOKENS * ROW_BYTES * len(LAYERS)))
    num_parts = max(int(gib * 2**30) // PART_BYTES, 2)
    written, dataset = bench_write(root, num_parts, source)
    large = make_large(root, source)
    return {
        **written,
        "parts": num_parts,
        "large_gigabytes": sum(path.stat().st_size for path in large.glob("*/*")) / 1e9,
        "large_parts": len(list(large.iterdir())) - 1,
        **bench_open(large),
        **bench_rows(dataset, root / "plain", num_parts),
        **bench_epoch(dataset, root / "plain", num_parts),
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
    command += f" --folder {options.folder}" if options.folder else ""
    results = {
        "benchmark": "store",
        "command": command,
        "commit": describe_commit(),
        "machine": describe_machine(),
        "folder": str(options.folder or tempfile.gettempdir()),
        **found,
    }
    print(json.dumps(results, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
