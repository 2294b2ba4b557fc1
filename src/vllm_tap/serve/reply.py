"""Rows of the prompts of a reply, as frames that are read by their name. In an API process's event loop."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Final, Protocol

import msgspec
import numpy as np

from vllm_tap.client.result import Capture
from vllm_tap.errors import BudgetError
from vllm_tap.frame import body
from vllm_tap.labels import KEY
from vllm_tap.serve.results import Result, Results
from vllm_tap.store.dtypes import bytes_of
from vllm_tap.vllm.asynchronous import Tokens

ROUTE: Final = "/v1/tap/rows"

ABORTED: Final = "the request was aborted."


class Replies(Protocol):
    """Takes the rows of the prompts of an HTTP request.

    Attributes:
        fields: Put into `kv_transfer_params`; filled in until the last prompt has ended.
    """

    fields: dict[str, Any]

    @property
    def has_readers(self) -> bool:
        """Tell whether somebody waits for rows now."""

    def expect(self) -> int:
        """Return the number of one more prompt."""

    async def add(self, prompt: int, captured: Capture, finished: bool) -> tuple[int, int]:
        """Take rows of a prompt; return how many, and their bytes.

        Raises:
            BudgetError: The server has no room for them.
        """

    def end(self, prompt: int, tokens: Tokens, error: str = "") -> str:
        """Say that a prompt has ended; return what kept rows of any from the client."""

    def close(self) -> None:
        """End what has not ended, with its HTTP request."""


class Reply:
    """Rows that wait to be read, and their handle.

    Args:
        results: Of this process.
        result: Of this request.
        streams: Layers of each stream.
        inline_bytes: Most bytes of rows that go into the reply itself.
    """

    def __init__(self, results: Results, result: Result, streams: Mapping[str, Any], inline_bytes: int = 0) -> None:
        self._results, self.result, self._inline_bytes = results, result, inline_bytes
        self._pending = 0
        self._error = ""
        self._choices: dict[tuple[int, int], dict[str, Any]] = {}
        self.handle: dict[str, Any] = {
            "id": result.id,
            "href": f"{ROUTE}/{result.id}",
            "streams": {name: list(layers) for name, layers in streams.items()},
            "dtype": {},
            "width": {},
            "choices": [],
        }
        self.fields = {KEY: self.handle}
        self._num_prompts = 0
        self._has_begun = False

    @property
    def has_readers(self) -> bool:
        """Tell whether somebody reads the result."""
        return self.result.has_readers

    def expect(self) -> int:
        """Return the number of one more prompt."""
        self._pending += 1
        self._num_prompts += 1
        return self._num_prompts - 1

    async def add(self, prompt: int, captured: Capture, finished: bool) -> tuple[int, int]:
        """Take rows of a prompt; return how many, and their bytes.

        Raises:
            BudgetError: The server has no room for them.
        """
        if self._error:
            return 0, 0
        num_bytes = 0
        if not self._has_begun:
            self._has_begun = True
            self._results.add(self.result, _begin(self.result.id, captured))
        for number, (_, completion) in enumerate(captured.sequences.slots):
            frame, positions = self._rows(prompt, completion, captured, number, finished)
            self._choice(prompt, completion)["positions"] += positions
            self._results.add(self.result, frame)
            num_bytes += len(frame)
        return captured.num_rows, num_bytes

    def _choice(self, prompt: int, completion: int) -> dict[str, Any]:
        new = {"prompt": prompt, "completion": completion, "positions": []}
        return self._choices.setdefault((prompt, completion), new)

    def _rows(
        self, prompt: int, completion: int, captured: Capture, number: int, finished: bool
    ) -> tuple[body.Encoded, list[int]]:
        start, stop = (int(bound) for bound in captured.sequences.wanted_starts[number : number + 2])
        flat = captured.sequences.wanted[start:stop]
        _, positions = captured.sequences.position_of(flat)
        labels = positions, captured.sequences.token_ids[flat]
        pieces: list[bytes | memoryview] = [label.astype("<i4").tobytes() for label in labels]
        planes = []
        for stream, layers in captured.layers.items():
            for layer in layers:
                rows = captured.rows(stream, layer, start, stop)
                dtype, width = str(rows.dtype).removeprefix("torch."), rows.shape[1]
                planes.append((stream, layer, dtype, width))
                pieces.append(bytes_of(rows).data)
                self.handle["dtype"][stream], self.handle["width"][stream] = dtype, width
        frame = body.encode_around(
            "rows",
            *pieces,
            prompt=prompt,
            completion=completion,
            finished=finished,
            rows=stop - start,
            planes=planes,
        )
        return frame, positions.tolist()

    def close(self) -> None:
        """End the result where a prompt has not ended, or never began, with its HTTP request."""
        self._results.end(self.result, ABORTED)

    def end(self, prompt: int, tokens: Tokens, error: str = "") -> str:
        """Say that a prompt has ended; the first error ends the result of all, and is returned."""
        self._pending -= 1
        if not error and not self._error:
            error = self._end_choices(prompt, tokens)
        if error and not self._error:
            self._error = self.handle["error"] = error
            self._results.end(self.result, error)
        self.handle["choices"][:] = [
            {**choice, "positions": ranges(choice["positions"])} for _, choice in sorted(self._choices.items())
        ]
        if not self._pending and not self._error:
            self._results.end(self.result)
            self._put_inline()
        return self._error

    def _end_choices(self, prompt: int, tokens: Tokens) -> str:
        """Add the frames that end the choices of a prompt; return what kept them from it."""
        try:
            for one in tokens.outputs:
                self._choice(prompt, one.index)
                frame = body.encode(
                    "choice",
                    request_id=tokens.request_id,
                    prompt=prompt,
                    completion=one.index,
                    prompt_token_ids=tokens.prompt_token_ids,
                    token_ids=one.token_ids,
                )
                self._results.add(self.result, frame)
        except BudgetError as full:
            return str(full)
        return ""

    def _put_inline(self) -> None:
        """Put a small result into the reply. Whoever chose a name may still read it; else it is not kept."""
        if (self.result.total_bytes or 0) > self._inline_bytes:
            return
        self.handle["data"] = base64.b64encode(b"".join(map(bytes, self.result.frames))).decode()
        if not self.result.is_named:
            del self.handle["href"]
            self._results.delete(self.result.key, self.result.id)


def _begin(name: str, captured: Capture) -> bytes:
    """Return the first frame of a body."""
    return body.encode(
        "begin",
        id=name,
        spec=msgspec.Raw(captured.spec.to_json().encode()),
        num_layers=captured.num_layers,
        layers=captured.layers,
        conventions=captured.conventions,
        has_final_norm=captured.has_final_norm,
        routing=captured.routing,
        model=captured.model,
    )


def ranges(positions: list[int]) -> list[list[int]]:
    """Return ascending positions as half-open ranges [begin, end]."""
    numbers = np.array(positions, np.int64)
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(numbers, breaks) if len(run)]
