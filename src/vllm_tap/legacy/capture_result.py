"""The redesign of 2026: `capture(...)` with a select clause, and its `CaptureResult`. Client process."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from vllm_tap.client import hints
from vllm_tap.client.result import Capture
from vllm_tap.errors import LayerError, SpecError
from vllm_tap.legacy import runs
from vllm_tap.legacy.select import IntArray, Select, covering, read_select
from vllm_tap.spec import Spec, nearest
from vllm_tap.vllm.frontend import pools

STREAMS: Final = ("hidden_states", "router_logits")


def capture(
    llm: Any,
    prompts: Any,
    max_tokens: int = 1,
    layers: Sequence[int] | None = None,
    dtype: str | torch.dtype | None = None,
    select: Any = None,
    per_prompt_selects: Sequence[Any] | None = None,
    stream: str = "hidden_states",
    **sampling: Any,
) -> CaptureResult:
    """Run prompts and return the rows of one stream that a clause selects. The result lives as long as you keep it.

    Args:
        llm: A `vllm.LLM`; one that embeds takes neither `max_tokens` nor sampling fields.
        prompts: Strings, or dicts as `LLM.generate` takes them.
        max_tokens: Tokens to generate.
        layers: Decoder layers; all that have the stream unless given.
        dtype: Dtype to cast rows to, such as "float16"; the stream's own unless given.
        select: A dict or an object with the fields of `vllm_tap.legacy.select`; all rows unless given.
        per_prompt_selects: A clause for each prompt, which takes the place of `select` for it unless it is None.
        stream: "hidden_states" or "router_logits".
        **sampling: Fields of `SamplingParams`; the temperature is 0.0 unless given.

    Returns:
        CaptureResult: one sample per prompt.

    Raises:
        TapError: As `vllm_tap.capture`; a SpecError for a clause, dtype or stream that cannot be.

    Source:
        Residual stream after each decoder layer, before the final norm; or the gate's output before softmax or sigmoid.

    Cost:
        As `vllm_tap.capture`: rows of phases that no clause names are never written. One gather a layer where rows are
        left out; a copy where they are cast.
    """
    if stream not in STREAMS:
        raise SpecError(f"stream={stream!r} is not known.{nearest(stream, STREAMS)}")
    clauses = _clauses(prompts, select, per_prompt_selects)
    chosen = "all" if layers is None else list(layers)
    spec = Spec(**{stream: chosen}, positions=covering(clauses), missing="skip")  # type: ignore[arg-type]
    cast = _dtype(dtype)
    if pools(llm):
        if sampling or max_tokens != 1:
            raise SpecError("this engine embeds: max_tokens and sampling fields mean nothing to it.")
        result = runs.embed(llm, prompts, spec)
    else:
        result = runs.generate(llm, prompts, spec, max_tokens, sampling)
    return CaptureResult(result, stream, clauses * (len(result) if len(clauses) == 1 else 1), cast)


def _clauses(prompts: Any, select: Any, per_prompt: Sequence[Any] | None) -> list[Select]:
    """Return one clause for all prompts, or one for each."""
    common = read_select(select)
    if per_prompt is None:
        return [common]
    num_prompts = len(prompts) if isinstance(prompts, Sequence) and not isinstance(prompts, str) else 1
    if len(per_prompt) != num_prompts:
        raise SpecError(f"{len(per_prompt)} per_prompt_selects for {num_prompts} prompts.")
    return [common if clause is None else read_select(clause) for clause in per_prompt]


def _dtype(given: str | torch.dtype | None) -> torch.dtype | None:
    if given is None or isinstance(given, torch.dtype):
        return given
    found = getattr(torch, str(given).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise SpecError(f'dtype={given!r} is not one of torch: for example "float16".')
    return found


class RowLabels:
    """Labels of the rows of a layer: the same for all layers of a capture.

    Attributes:
        req_ids: vLLM's name of the row's request, list of strings [R].
        positions: Position in the sequence, Tensor int32 [R].
        token_ids: Token at that position, Tensor int32 [R].
    """

    def __init__(self, req_ids: list[str], positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        self.req_ids, self.positions, self.token_ids = req_ids, positions, token_ids

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.req_ids)


class CaptureResult:
    """Selected rows of one stream, by layer and by sample; tensors are made when they are first asked for.

    Attributes:
        layer_ids: Decoder layers, ascending.
        outputs: What vLLM returned, in the order of the prompts.
        labelled: Always true: every row's position and token are known.
    """

    labelled = True

    def __init__(self, result: Capture, stream: str, clauses: Sequence[Select], dtype: torch.dtype | None) -> None:
        self.outputs = result.outputs
        self.layer_ids: list[int] = result.layers.get(stream, [])
        self._result, self._stream, self._dtype = result, stream, dtype
        self._cache: dict[int, torch.Tensor] = {}
        kept = [
            np.flatnonzero(
                clause.rows(sample.positions.numpy().astype(np.int64), len(output.prompt_token_ids), _ids(sample))
            )
            for sample, output, clause in zip(result, result.outputs, clauses, strict=True)
        ]
        counts = [len(sample) for sample in result]
        starts = np.concatenate(([0], np.cumsum(counts)))
        self._ends = np.cumsum([0, *map(len, kept)]).tolist()
        self._kept: IntArray = np.concatenate([rows + start for rows, start in zip(kept, starts, strict=False)])
        positions, tokens = ([getattr(s, name) for s in result] for name in ("positions", "token_ids"))
        index = torch.from_numpy(self._kept)
        self._positions, self._token_ids = torch.cat(positions)[index], torch.cat(tokens)[index]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.outputs)

    def rows(self, layer: int) -> torch.Tensor:
        """Return the selected rows of a layer over all samples, sample after sample.

        Returns:
            Tensor [R, D] in the stream's dtype or the one that was asked for, CPU. It may be a view of what this result
            holds: what you write into it shows when the same rows are read again, and `clone()` gives a copy.

        Raises:
            LayerError: The layer is not in this capture.

        Source:
            See `capture`.

        Cost:
            Once per layer: no copy when all rows are wanted and lie in one block, else a gather.
        """
        self._require(layer)
        if layer not in self._cache:
            rows = self._result.rows(self._stream, layer)
            if len(self._kept) != len(rows):
                rows = rows.index_select(0, torch.from_numpy(self._kept))
            self._cache[layer] = rows if self._dtype is None else rows.to(self._dtype)
        return self._cache[layer]

    @functools.cached_property
    def layers(self) -> dict[int, torch.Tensor]:
        """All rows: {layer: Tensor [R, D]}; see `rows`."""
        return {layer: self.rows(layer) for layer in self.layer_ids}

    def sample(self, i: int) -> dict[int, torch.Tensor]:
        """Return the rows of a prompt: {layer: Tensor [R, D]}, views of `rows`."""
        piece = self._piece(i)
        return {layer: rows[piece] for layer, rows in self.layers.items()}

    def sample_positions(self, i: int) -> list[int]:
        """Return the positions of a prompt's rows in its sequence, ascending."""
        return list(self._positions[self._piece(i)].tolist())

    def sample_token_ids(self, i: int) -> list[int]:
        """Return the tokens at the positions of a prompt's rows."""
        return list(self._token_ids[self._piece(i)].tolist())

    def meta(self, layer: int) -> RowLabels:
        """Return what each row of a layer is.

        Raises:
            LayerError: The layer is not in this capture.
        """
        self._require(layer)
        names = np.array([output.request_id for output in self.outputs], dtype=object)
        return RowLabels(np.repeat(names, np.diff(self._ends)).tolist(), self._positions, self._token_ids)

    def to_nested(self) -> list[list[torch.Tensor]]:
        """Return [sample][layer] Tensor [R, D], as `get_all_hidden_states_generate` does."""
        return [list(self.sample(i).values()) for i in range(len(self))]

    def _require(self, layer: int) -> None:
        if layer not in self.layer_ids:
            raise LayerError(
                f"layer {layer} was not captured: this result has layers {self.layer_ids}. {self._advice(layer)}",
                layer=layer,
            )

    def _advice(self, layer: int) -> str:
        if not isinstance(layer, int) or layer < 0:
            return "Name one of them: layers count from 0."
        advice = hints.for_layer(self._result, self._stream, layer)
        return f"Capture again with layers={sorted({*self.layer_ids, layer})}." if "Spec(" in advice else advice

    def _piece(self, i: int) -> slice:
        number = range(len(self))[i]
        return slice(self._ends[number], self._ends[number + 1])


def _ids(sample: Any) -> IntArray:
    ids: IntArray = sample.token_ids.numpy()
    return ids
