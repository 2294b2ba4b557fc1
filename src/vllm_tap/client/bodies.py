"""Samples and blocks of rows out of the frames of a server's bodies. In a process without the engine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import torch

from vllm_tap import codec as codecs
from vllm_tap.client.owned import OwnedRows, Place
from vllm_tap.client.reduced import with_one_row_each
from vllm_tap.client.result import Capture, Sample
from vllm_tap.client.sequences import Sequences
from vllm_tap.client.tap import RowBlock
from vllm_tap.errors import CaptureError, DescriptorError, RowsMissingError, TransportError
from vllm_tap.frame import body
from vllm_tap.frame.routing import Routing
from vllm_tap.spec import Spec

MAX_ROWS: Final = 1 << 24
LABEL_BYTES: Final = 4
"""Of a position, and of a token id."""

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]

DTYPES: Final = {"float8_e4m3fn", "bfloat16", "float16", "float32", "float64", "uint8", "int16", "int32", "int64"}


class _Choices:
    """Frames of a body, read one after another."""

    def __init__(self) -> None:
        self._facts: dict[str, Any] | None = None
        self._model: dict[str, str] = {}

    def _begun(self, head: Mapping[str, Any]) -> bool:
        """Take the frames that are of no choice; return whether this is one of those."""
        if head["kind"] == "error":
            raise CaptureError(f"the server could not capture: {head['message']}")
        if head["kind"] == "begin":
            self._facts = {
                "spec": Spec.from_json(json.dumps(head["spec"])),
                "conventions": head["conventions"],
                "routing": msgspec.convert(head["routing"], dict[int, Routing], strict=False),
                "streams": list(head["layers"]),
                "num_layers": head["num_layers"],
                "has_final_norm": head["has_final_norm"],
            }
            self._model = msgspec.convert(head["model"], dict[str, str])
            return True
        return bool(head["kind"] == "end")

    @property
    def facts(self) -> dict[str, Any]:
        """The capture."""
        if self._facts is None:
            raise DescriptorError("a body of rows does not say what it has before it begins")
        return self._facts

    def _capture(self, prompt: int, output: Any, sequences: Sequences, tensors: dict[Place, torch.Tensor]) -> Capture:
        facts = self.facts
        result = Capture(
            facts["spec"],
            [output],
            sequences,
            [OwnedRows(tensors)],
            facts["conventions"],
            facts["routing"],
            facts["streams"],
            facts["num_layers"],
            facts["has_final_norm"],
        )
        result.first_sample, result.model = prompt, self._model
        return result


class Samples(_Choices):
    """Whole choices."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[tuple[int, int], list[_Rows]] = {}
        self._samples: dict[tuple[int, int], Sample] = {}

    def add(self, frame: body.Frame) -> None:
        head = frame.head
        with malformed():
            if self._begun(head):
                return
            place = int(head["prompt"]), int(head["completion"])
            if head["kind"] == "rows":
                self._rows.setdefault(place, []).append(_Rows(frame))
            else:
                self._samples[place] = self._sample(head, *place)

    def _sample(self, head: Mapping[str, Any], prompt: int, completion: int) -> Sample:
        prompt_ids, ids = (msgspec.convert(head[name], list[TokenId]) for name in ("prompt_token_ids", "token_ids"))
        one = SimpleNamespace(index=completion, token_ids=ids)
        output = SimpleNamespace(request_id=head["request_id"], prompt_token_ids=prompt_ids, outputs=[one])
        sequences = Sequences([output], self.facts["spec"].positions)
        if self.facts["spec"].reduce is not None:
            sequences = with_one_row_each(sequences)
        blocks = self._rows.pop((prompt, completion), [])
        _, positions = sequences.position_of(sequences.wanted)
        come = np.concatenate([np.empty(0, np.int32), *(block.positions for block in blocks)])
        if come.tolist() != positions.tolist():
            raise RowsMissingError(
                f"prompt {prompt}, completion {completion}: {len(come)} rows came of {len(positions)}. Ask again.",
                sample=prompt,
            )
        tensors = {
            key: torch.cat([block.tensors[key] for block in blocks]) for key in (blocks[0].tensors if blocks else ())
        }
        return self._capture(prompt, output, sequences, tensors).sample(0, completion)

    def samples(self) -> list[Sample]:
        return [sample for _, sample in sorted(self._samples.items(), key=lambda item: item[0])]


class Blocks(_Choices):
    """Rows of choices as they come."""

    def add(self, frame: body.Frame) -> Iterable[RowBlock]:
        head = frame.head
        with malformed():
            if self._begun(head):
                return []
            if head["kind"] == "choice":
                return []
            rows = _Rows(frame)
            output = SimpleNamespace(request_id="", outputs=[], prompt_token_ids=None)
            sequences = Sequences.of_rows(head["completion"], rows.positions, rows.token_ids)
            block = RowBlock(self._capture(head["prompt"], output, sequences, rows.tensors), 0)
            block.finished = bool(head["finished"])
            return [block]


class _Rows:
    """Rows of a frame, checked against its length."""

    def __init__(self, frame: body.Frame) -> None:
        head, self._end = frame.head, 0
        self._num = num_rows = int(head["rows"])
        if not 0 <= num_rows <= MAX_ROWS:
            raise ValueError(f"{num_rows} rows")
        self._data = np.frombuffer(_decoded(frame), np.uint8)
        self.positions, self.token_ids = self._array(1, "int32").numpy()[:, 0], self._array(1, "int32").numpy()[:, 0]
        self.tensors: dict[Place, torch.Tensor] = {
            (str(stream), int(layer)): self._array(int(width), dtype) for stream, layer, dtype, width in head["planes"]
        }
        if self._end != len(self._data):
            raise ValueError(f"{len(self._data)} bytes for {self._end}")

    def _array(self, width: int, dtype: str) -> torch.Tensor:
        if dtype not in DTYPES or width < 1:
            raise ValueError(f"rows of {width} elements of {dtype!r}")
        kind = getattr(torch, dtype)
        begin, self._end = self._end, self._end + self._num * width * kind.itemsize
        if self._end > len(self._data):
            raise ValueError(f"{len(self._data)} bytes for {self._end} and more")
        if begin == self._end:
            return torch.empty(0, width, dtype=kind)
        return torch.from_numpy(self._data[begin : self._end].copy()).view(kind).view(self._num, width)


def _decoded(frame: body.Frame) -> bytearray:
    """Return the data of a frame."""
    if "codec" not in frame.head:
        return bytearray(frame.data)
    name, nbytes, itemsize = frame.head["codec"]
    widths = [int(width) * getattr(torch, dtype).itemsize for _, _, dtype, width in frame.head["planes"]]
    if nbytes != int(frame.head["rows"]) * (2 * LABEL_BYTES + sum(widths)):
        raise ValueError(f"{nbytes} bytes of {frame.head['rows']} rows")
    return bytearray(codecs.get(name).decode(memoryview(frame.data), nbytes, itemsize))


class malformed:  # noqa: N801 (a context manager)
    """Turn what a frame lacks, or has too much of, into one error."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, CaptureError | TransportError | MemoryError):
            raise DescriptorError(f"a frame of rows says what cannot be: {kind.__name__}: {error}") from error
