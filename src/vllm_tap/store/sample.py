"""One sequence of a dataset, with the attributes that a captured `Sample` has. In any process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from vllm_tap.spec import Spec
from vllm_tap.store.index import IndexRow

if TYPE_CHECKING:
    import torch


class SampleSource(Protocol):
    """Part of a dataset that its samples need."""

    @property
    def spec(self) -> Spec:
        """Return what was asked for."""

    @property
    def layers(self) -> dict[str, list[int]]:
        """Return {stream: layers}."""

    @property
    def num_layers(self) -> int:
        """Return the number of the model's layers."""

    @property
    def has_final_norm(self) -> bool:
        """Tell whether the model has a final norm."""

    def require(self, stream: str) -> None:
        """Refuse a stream that is not there."""

    def has_layer(self, stream: str, layer: object) -> bool:
        """Tell whether a layer of a stream is there."""

    def rows(self, stream: str, layer: int) -> Any:
        """Return the rows of a layer."""

    def label(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Return labels of rows by name."""

    def record(self, sample: int, completion: int) -> IndexRow:
        """Return what the index says of a sequence."""

    def completions(self, sample: int) -> list[IndexRow]:
        """Return what the index says of all sequences of a sample."""


@dataclass(frozen=True, slots=True)
class RecordedCompletion:
    """A completion, as far as it is kept."""

    index: int
    text: str | None
    token_ids: list[int]
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class RecordedOutput:
    """An output, as far as it is kept."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[RecordedCompletion]


class LayerMap(Mapping[int, "torch.Tensor"]):
    """One stream of one sample: {layer: Tensor [R, D]}. Negative layers count from the end of the model."""

    def __init__(self, source: SampleSource, stream: str, start: int, stop: int) -> None:
        self._source, self._stream, self._range = source, stream, slice(start, stop)

    def __getitem__(self, layer: int) -> torch.Tensor:
        """Return the rows of a layer.

        Returns:
            Tensor [R, D] in the stream's dtype, CPU, rows in order of position: a view of the file's pages,
            copy-on-write.

        Raises:
            LayerError: The layer is not in this dataset.
        """
        tensor: torch.Tensor = self._source.rows(self._stream, layer)[self._range]
        return tensor

    def numpy(self, layer: int) -> npt.NDArray[Any]:
        """Return the rows of a layer as an array [R, D], without torch; bfloat16 comes as float32, without loss."""
        array: npt.NDArray[Any] = self._source.rows(self._stream, layer).numpy(self._range.start, self._range.stop)
        return array

    def __contains__(self, layer: object) -> bool:
        return self._source.has_layer(self._stream, layer)

    def get(self, layer: int, default: Any = None) -> Any:
        """Return the rows of a layer, or `default` if it is not in this dataset."""
        return self[layer] if layer in self else default  # noqa: SIM401 (this is `get`)

    def __iter__(self) -> Iterator[int]:
        return iter(self._source.layers[self._stream])

    def __len__(self) -> int:
        return len(self._source.layers[self._stream])

    def __repr__(self) -> str:
        return f"<{self._stream}: layers {list(self)}, {self._range.stop - self._range.start} rows>"


class Sample:
    """The rows of one sequence: a prompt and one of its completions.

    Attributes:
        index: Number of the sample: the place of its prompt among all that were recorded.
        completion: Number of the completion.
        start: Number of its first row in `Dataset.rows`.
        stop: Number behind that of its last row.
    """

    def __init__(self, source: SampleSource, index: int, completion: int, start: int, stop: int) -> None:
        self._source = source
        self.index, self.completion, self.start, self.stop = index, completion, start, stop

    def _key(self) -> tuple[int, int, int]:
        return id(self._source), self.index, self.completion

    def __eq__(self, other: object) -> bool:
        """Tell whether this is the same sequence of the same dataset."""
        return isinstance(other, Sample) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.stop - self.start

    @property
    def spec(self) -> Spec:
        """The specification that was asked for, that of all samples of a dataset."""
        return self._source.spec

    @property
    def positions(self) -> torch.Tensor:
        """Positions of the rows in the sequence. Tensor int32 [R], ascending."""
        return self._label("positions")

    @property
    def token_ids(self) -> torch.Tensor:
        """Token ids at the rows' positions. Tensor int32 [R]."""
        return self._label("token_ids")

    def _label(self, name: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(self._source.label(name, self.start, self.stop).astype(np.int32))

    @property
    def hidden_states(self) -> LayerMap:
        """The residual stream after each decoder layer, before the final norm: {layer: Tensor [R, D]}."""
        return self._layers("hidden_states")

    @property
    def hidden_states_fp8(self) -> LayerMap:
        """The same in e4m3, of dtype="fp8"; to be multiplied by `hidden_states_scale`: {layer: Tensor [R, D]}."""
        return self._layers("hidden_states_fp8")

    @property
    def hidden_states_scale(self) -> LayerMap:
        """A scale for each row of `hidden_states_fp8`: {layer: Tensor float32 [R, 1]}."""
        return self._layers("hidden_states_scale")

    @property
    def attention_output(self) -> LayerMap:
        """Rows that attention, or a block in its place, adds to the residual stream: {layer: Tensor [R, D]}."""
        return self._layers("attention_output")

    @property
    def mlp_output(self) -> LayerMap:
        """Rows that the MLP or the experts add to the residual stream: {layer: Tensor [R, D]}."""
        return self._layers("mlp_output")

    @property
    def router_logits(self) -> LayerMap:
        """The gate's output before softmax or sigmoid: {layer: Tensor [R, E]}."""
        return self._layers("router_logits")

    @property
    def expert_ids(self) -> LayerMap:
        """Experts as the router chose them: {layer: Tensor [R, K], the smallest integer dtype}."""
        return self._layers("expert_ids")

    @property
    def expert_weights(self) -> LayerMap:
        """Weights of the chosen experts as the router computed them: {layer: Tensor [R, K]}."""
        return self._layers("expert_weights")

    @property
    def embeddings(self) -> torch.Tensor:
        """The input of decoder layer 0. Tensor [R, D]."""
        return self._layers("embeddings")[0]

    @property
    def final_hidden_states(self) -> torch.Tensor:
        """The output of the final norm. Tensor [R, D]."""
        return self._layers("final_hidden_states")[-1]

    def as_hf(self) -> Any:
        """Return the rows as a Hugging Face model returns them; see `vllm_tap.Sample.as_hf`."""
        from vllm_tap.client.hugging_face import output_of

        return output_of(self, self._source)  # type: ignore[arg-type]

    def _layers(self, stream: str) -> LayerMap:
        self._source.require(stream)
        return LayerMap(self._source, stream, self.start, self.stop)

    @property
    def output(self) -> RecordedOutput:
        """The prompt's output with all its completions, as far as it is kept, by the names that vLLM uses."""
        rows = self._source.completions(self.index)
        completions = [
            RecordedCompletion(row.completion, row.text, row.generated_token_ids, row.finish_reason) for row in rows
        ]
        return RecordedOutput(rows[0].request_id, rows[0].prompt, rows[0].prompt_token_ids, completions)

    @property
    def prompt(self) -> str | None:
        """Text of the prompt, where it was one."""
        return self._record.prompt

    @property
    def text(self) -> str | None:
        """Text that was generated; None for an embedding."""
        return self._record.text

    @property
    def prompt_token_ids(self) -> list[int]:
        """Token ids of the prompt."""
        return self._record.prompt_token_ids

    @property
    def generated_token_ids(self) -> list[int]:
        """Token ids that were generated; the last one never entered the model."""
        return self._record.generated_token_ids

    @property
    def finish_reason(self) -> str | None:
        """Why generation ended, in vLLM's word."""
        return self._record.finish_reason

    @property
    def request_id(self) -> str:
        """Name of the request that its output gave."""
        return self._record.request_id

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata that the user gave for this sample; empty without any."""
        return self._record.metadata

    @property
    def _record(self) -> IndexRow:
        return self._source.record(self.index, self.completion)

    def __repr__(self) -> str:
        return f"<Sample {self.index}: {len(self)} rows of {', '.join(self._source.layers)}>"
