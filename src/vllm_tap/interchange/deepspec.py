"""DeepSpec: a target cache of version 2, shards of bytes with an index and a manifest. In any process."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from vllm_tap.interchange.drafts import Drafts, DraftSample, Loss
from vllm_tap.interchange.source import model_of
from vllm_tap.store.dtypes import bytes_of

RECORD: Final = struct.Struct("<QIIQQQQQ")
"""Sample, shard, length, and where each of the five arrays begins."""

SHARD_BYTES: Final = 4 << 30


def write(
    source: Any, folder: Path, *, layers: Sequence[int] | str | None = None, loss: Loss = "generated"
) -> dict[str, Any]:
    """Write the cache, in bfloat16. The last state is that behind the final norm. DeepSpec's layer ids are ours."""
    drafts = Drafts(source, "deepspec", layers, "post-norm", loss)
    shards = Shards(folder)
    with (folder / "samples.idx").open("wb") as index:
        for sample in drafts:
            index.write(shards.add(sample))
    shards.close()
    manifest = {
        "version": 2,
        "num_samples": shards.num_samples,
        "num_shards": len(shards.names),
        "target_layer_ids": drafts.layers,
        "hidden_dtype": "bfloat16",
        "token_dtype": "int32",
        "mask_dtype": "uint8",
        "index_record_size": RECORD.size,
        "hidden_size": drafts.hidden_size,
        "shards": [{"shard_id": number, "file_name": name} for number, name in enumerate(shards.names)],
        # Compared with the name in the trainer's configuration.
        "target_model_name_or_path": model_of(source).get("name", ""),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True))
    return {**drafts.facts, "target_layer_ids": drafts.layers}


class Shards:
    """Files that samples are appended to; a new one begins when one is full."""

    def __init__(self, folder: Path, max_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._file: BinaryIO | None = None
        self.names: list[str] = []
        self.num_samples = 0

    def add(self, sample: DraftSample) -> bytes:
        """Append a sample and return its record."""
        import torch

        mask = torch.ones(len(sample.token_ids), dtype=torch.uint8)
        arrays = [
            sample.token_ids.int(),
            mask,
            sample.loss_mask.to(torch.uint8),
            sample.aux.flatten(1).bfloat16(),
            sample.last.bfloat16(),
        ]
        file = self._room(sum(one.nbytes for one in arrays))
        offsets = []
        for one in arrays:
            offsets.append(file.tell())
            file.write(bytes_of(one).data)
        record = RECORD.pack(self.num_samples, len(self.names) - 1, len(mask), *offsets)
        self.num_samples += 1
        return record

    def _room(self, num_bytes: int) -> BinaryIO:
        if self._file is None or (self._file.tell() and self._file.tell() + num_bytes > self._max_bytes):
            self.close()
            self.names.append(f"shard-{len(self.names):05d}.bin")
            self._file = (self._folder / self.names[-1]).open("wb")
        return self._file

    def close(self) -> None:
        """End the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
