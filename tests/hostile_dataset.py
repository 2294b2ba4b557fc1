"""Mutates files of a dataset: each is refused, or read right. `python tests/hostile_dataset.py --count 1000000`.

Runs in a process of its own, whose memory is bounded: what a file claims beyond its length is not allocated. Some
mutations come with the checksum that they would need, as an attacker's do; then what is read must be within the file.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))

from synthetic_rows import LAYERS, MODEL, SyntheticCapture, bits, prompts_of
from vllm_tap.errors import DatasetError, RowsMissingError, SpecError
from vllm_tap.store import facts, manifest
from vllm_tap.store.dataset import Dataset, open_dataset
from vllm_tap.store.recording import Run, record_with

PROMPTS = prompts_of(6)
ROOM_BYTES = 1 << 30
NUMBERS = [0, 1, -1, 2**31, 2**48, 2**63 - 1, 2**64, 10**30, 0.5, "", "x", None, [], {}, True]


def everything(dataset: Dataset) -> list[object]:
    """Return all that can be read of a dataset; what lies in shards as bytes."""
    found: list[object] = [len(dataset), dataset.num_rows, dataset.spec, dataset.layers, dataset.conventions]
    for sample in dataset.sequences():
        found += [sample.index, sample.completion, sample.positions.tolist(), sample.token_ids.tolist()]
        found += [sample.prompt, sample.text, sample.metadata, sample.finish_reason, sample.weight_versions]
    for stream in LAYERS:
        for layer in dataset.layers.get(stream, ()):
            found.append(bits(dataset.rows(stream, layer)[:]))
    return found


def bytes_changed(data: bytes, rng: random.Random) -> bytes:
    """Change, cut, repeat or add bytes."""
    changed = bytearray(data)
    kind = rng.randrange(5)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        return data + rng.randbytes(rng.randrange(1, 64))
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(changed))
        if kind == 2:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            changed[at] = rng.choice(b'0123456789"{}[],:-\x00\xff')
        else:
            end = at + rng.randrange(1, 32)
            changed[at:end] = changed[end : end + rng.randrange(1, 32)]
    return bytes(changed)


def json_changed(data: bytes, rng: random.Random) -> bytes:
    """Change a value of a JSON object, somewhere within."""
    fields = json.loads(data)
    holder = fields
    while True:
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.8:
            holder = holder[key]
            continue
        if rng.random() < 0.1:
            del holder[key]
        else:
            holder[key] = rng.choice(NUMBERS)
        return json.dumps(fields).encode()


def sealed_again(data: bytes) -> bytes:
    """Return a manifest with the checksum that fits it."""
    rest = data.partition(b",")[2]
    return b'{"crc32":"%08x",' % zlib.crc32(rest) + rest


class Hostile:
    """A dataset of two parts, in whose copy files are changed."""

    def __init__(self, root: Path) -> None:
        run = Run(SyntheticCapture([]).spec, MODEL, "", {"vllm_tap": "0"})
        self._root = root / "run"
        record_with(SyntheticCapture, PROMPTS, self._root, run, batch=3)
        self._expected = everything(open_dataset(self._root))
        self._part = self._root / "part-000000000003"
        self._shards = sorted(path.name for path in self._part.glob("*.safetensors"))
        self.counts: Counter[str] = Counter()

    def step(self, rng: random.Random) -> None:
        """Change one file, read everything, and put back what was there."""
        changes: list[tuple[str, Callable[[random.Random], dict[str, bytes]]]] = [
            ("manifest", self._manifest),
            ("forged manifest", self._forged_manifest),
            ("forged facts", self._forged_facts),
            ("index", self._index),
            ("forged index", self._forged_index),
            ("header", self._header),
            ("length", self._length),
        ]
        name, change = rng.choice(changes)
        written = change(rng)
        kept = {path: (self._part / path).read_bytes() for path in written}
        for path, data in written.items():
            (self._part / path).write_bytes(data)
        try:
            self._read(name, is_changed=written != kept)
        finally:
            for path, data in kept.items():
                (self._part / path).write_bytes(data)

    def _read(self, name: str, is_changed: bool) -> None:
        try:
            found = everything(open_dataset(self._root))
        except (DatasetError, SpecError, RowsMissingError) as error:
            if not is_changed:
                raise AssertionError(f"{name}: nothing was changed") from error
            self.counts[f"{name}: refused"] += 1
            return
        # Whoever forges a checksum may say other things of the model than the writer, but makes no rows.
        if not name.startswith("forged"):
            assert found == self._expected, f"{name}: read wrong"
        known = [one for one in self._expected if isinstance(one, bytes)]
        for rows in (one for one in found if isinstance(one, bytes)):
            assert any(rows in whole for whole in known), f"{name}: rows that no file holds"
        self.counts[f"{name}: read"] += 1

    def _manifest(self, rng: random.Random) -> dict[str, bytes]:
        return {manifest.NAME: bytes_changed((self._part / manifest.NAME).read_bytes(), rng)}

    def _forged_manifest(self, rng: random.Random) -> dict[str, bytes]:
        data = (self._part / manifest.NAME).read_bytes()
        if rng.random() < 0.7:
            fields = json.loads(data)
            fields.pop("crc32")
            data = b'{"crc32":"",' + json_changed(json.dumps(fields).encode(), rng)[1:]
        else:
            data = data[:20] + bytes_changed(data[20:], rng)
        return {manifest.NAME: sealed_again(data)}

    def _forged_facts(self, rng: random.Random) -> dict[str, bytes]:
        data = (self._part / manifest.FACTS_NAME).read_bytes()
        data = json_changed(data, rng) if rng.random() < 0.7 else bytes_changed(data, rng)
        stated = (self._part / manifest.NAME).read_bytes()
        old = json.loads(stated)["facts"].encode()
        return {
            manifest.FACTS_NAME: data,
            manifest.NAME: sealed_again(stated.replace(old, facts.digest(data).encode())),
        }

    def _index(self, rng: random.Random) -> dict[str, bytes]:
        return {manifest.INDEX_NAME: bytes_changed((self._part / manifest.INDEX_NAME).read_bytes(), rng)}

    def _forged_index(self, rng: random.Random) -> dict[str, bytes]:
        changed = self._index(rng)
        stated = json.loads((self._part / manifest.NAME).read_bytes())
        stated.pop("crc32")
        (entry,) = (file for file in stated["files"] if file["name"] == manifest.INDEX_NAME)
        data = changed[manifest.INDEX_NAME]
        entry.update(nbytes=len(data), crc32=zlib.crc32(data))
        sealed = sealed_again(b'{"crc32":"",' + json.dumps(stated).encode()[1:])
        return {manifest.NAME: sealed, **changed}

    def _header(self, rng: random.Random) -> dict[str, bytes]:
        name = rng.choice(self._shards)
        data = (self._part / name).read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        changed = bytes_changed(data[:size], rng)
        # As long as before, half of the time: else the length alone would give it away.
        return {name: (changed.ljust(size)[:size] if rng.random() < 0.5 else changed) + data[size:]}

    def _length(self, rng: random.Random) -> dict[str, bytes]:
        name = rng.choice([*self._shards, manifest.INDEX_NAME, manifest.FACTS_NAME])
        data = (self._part / name).read_bytes()
        return {
            name: data[: rng.randrange(len(data))]
            if rng.random() < 0.7
            else data + rng.randbytes(1 + rng.randrange(99))
        }


def run(count: int, seed: int, root: Path) -> Counter[str]:
    """Make so many mutations; return what became of them."""
    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)
    hostile = Hostile(root)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, resource.RLIM_INFINITY))
    for number in range(count):
        rng = random.Random(seed + number)
        try:
            hostile.step(rng)
        except BaseException as error:
            error.add_note(f"with seed {seed + number}")
            raise
    return hostile.counts


def main() -> None:
    """Make as many mutations as were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        print(json.dumps(run(options.count, options.seed, root), indent=1, sort_keys=True))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
