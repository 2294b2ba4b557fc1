"""Results of a capture in the hands of a user: samples, layers, labelled tensors. Client process."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from vllm_tap.client import hints
from vllm_tap.client.hugging_face import output_of
from vllm_tap.client.owned import OwnedRows, Place, RowSource
from vllm_tap.client.sequences import Sequences
from vllm_tap.errors import DatasetError, LayerError, RowsMissingError, SpecError
from vllm_tap.frame.routing import Routing
from vllm_tap.sample import SampleStreams
from vllm_tap.spec import Spec
from vllm_tap.streams import not_of_samples

if TYPE_CHECKING:
    from vllm_tap.client.model_output import HuggingFaceOutput
    from vllm_tap.store.source import ShardWriter


class RowLabels(NamedTuple):
    """Labels of each row: tensors [R], CPU, the same for all streams and layers of a capture.

    Attributes:
        samples: Number of the prompt, int64.
        completions: Number of its completion, int64; 0 unless `n` is above 1.
        positions: Position in the sequence, int32.
        token_ids: Token at that position, int32.
    """

    samples: torch.Tensor
    completions: torch.Tensor
    positions: torch.Tensor
    token_ids: torch.Tensor


class LayerMap(Mapping[int, torch.Tensor]):
    """One stream of one sample: {layer: Tensor [R, D]}. Negative layers count from the end of the model."""

    def __init__(self, sample: Sample, stream: str) -> None:
        self._sample, self._capture, self._stream = sample, sample._capture, stream

    def __getitem__(self, layer: int) -> torch.Tensor:
        """Return the rows of a layer.

        Returns:
            Tensor [R, D] in the stream's dtype, CPU, rows in order of position. It may be a view of what this result
            holds: what you write into it stays in this process, and shows when the same rows are read again. `clone()`
            gives a copy of its own.

        Raises:
            LayerError: The layer is not in this capture.

        Source:
            See `Capture.conventions`; the rank of the pipeline stage that holds the layer.

        Cost:
            No copy when the rows lie in one block, else one gather each time. A page of a view is copied when it is
            first written. No device sync.
        """
        return self._capture.rows(self._stream, layer, *self._sample._range)

    def __contains__(self, layer: object) -> bool:
        return self._capture._owner_of(self._stream, layer) is not None

    def get(self, layer: int, default: Any = None) -> Any:
        """Return the rows of a layer, or `default` if it is not in this capture."""
        return self[layer] if layer in self else default  # noqa: SIM401 (this is `get`)

    def __iter__(self) -> Iterator[int]:
        return iter(self._capture.layers[self._stream])

    def __len__(self) -> int:
        return len(self._capture.layers[self._stream])

    def __repr__(self) -> str:
        return f"<{self._stream}: layers {list(self)}, {len(self._sample)} rows>"

    def __reduce__(self) -> Any:
        return getattr, (self._sample._alone(self._stream), self._stream)


class Sample(SampleStreams[LayerMap]):
    """The rows of one sequence: a prompt and one of its completions."""

    def __init__(self, capture: Capture, number: int) -> None:
        self._capture, self._number = capture, number
        starts = capture.sequences.wanted_starts
        self._range = int(starts[number]), int(starts[number + 1])

    def __eq__(self, other: object) -> bool:
        """Tell whether this is the same sequence of the same capture."""
        mine = self._capture, self._number
        return isinstance(other, Sample) and mine == (other._capture, other._number)

    def __hash__(self) -> int:
        return hash((id(self._capture), self._number))

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._range[1] - self._range[0]

    @property
    def positions(self) -> torch.Tensor:
        """Positions of the rows in the sequence. Tensor int32 [R], ascending. Of a reduced row, its last position."""
        _, positions = self._capture.sequences.position_of(self._wanted)
        return torch.from_numpy(positions.astype(np.int32))

    @property
    def token_ids(self) -> torch.Tensor:
        """Token ids at the rows' positions, equal to the final sequence's. Tensor int32 [R]."""
        return torch.from_numpy(self._capture.sequences.token_ids[self._wanted])

    @property
    def index(self) -> int:
        """Place of the prompt among those of the call."""
        return self._slot[0] + self._capture.first_sample

    @property
    def completion(self) -> int:
        """Number of the completion of the prompt; 0 unless `n` is above 1."""
        return self._slot[1]

    @property
    def spec(self) -> Spec:
        """The specification that this sample was asked for by."""
        specs = self._capture.specs
        return self._capture.spec if specs is None else specs[self._slot[0]]

    @property
    def output(self) -> Any:
        """vLLM's output of the prompt, with all its completions."""
        return self._capture.outputs[self._slot[0]]

    @property
    def _slot(self) -> tuple[int, int]:
        return self._capture.sequences.keys[self._number]

    def _alone(self, *streams: str) -> Sample:
        """Return this sample as that of a capture that holds nothing else; of all streams unless some are named."""
        return Sample(self._capture._only(self._number, streams or tuple(self._capture.layers)), 0)

    def __reduce__(self) -> Any:
        alone = self._alone()
        return Sample, (alone._capture, alone._number)

    @property
    def _wanted(self) -> Any:
        return self._capture.sequences.wanted[slice(*self._range)]

    def as_hf(self) -> HuggingFaceOutput:
        """Return the rows as a Hugging Face model returns them when asked for hidden states and router logits.

        Returns:
            A `transformers.utils.ModelOutput` (without transformers, what reads like one) with `hidden_states`, L + 1
            tensors [1, R, D], and `router_logits`, a tensor [R, E] for each layer with experts; each is None where it
            was not captured. Model dtype, CPU; see `LayerMap` for their lifetime.

        Raises:
            SpecError: The capture lacks positions, layers, embeddings or final hidden states; the message names the
                `Spec` that has them.

        Source:
            `output_hidden_states=True`: [0] is what goes into decoder layer 0 (where a model scales its embeddings,
            after that), [i] the residual stream after layer i - 1, and the last one the output of the final norm,
            where the model has one.
            `output_router_logits=True`: the gate's output before softmax or sigmoid, as transformers 5.19 returns it.

        Cost:
            That of reading each tensor once (see `LayerMap`); the further axis is a view.
        """
        return output_of(self, self._capture, self.spec)

    def _layers(self, stream: str) -> LayerMap:
        self._capture.require(stream)
        return LayerMap(self, stream)

    def __repr__(self) -> str:
        return f"<Sample: {len(self)} rows of {', '.join(self._capture.layers)}>"


class Capture(Sequence[Sample]):
    """The result of a capture: one sample per prompt, in the order of the prompts.

    It can be pickled and copied deeply, as can its samples and their streams: the copy owns its rows.

    Attributes:
        outputs: What vLLM returned, in the order of the prompts.
        layers: {stream: layers captured, ascending}. Empty for router streams of a model without experts, which
            only `Spec(missing="skip")` takes.
        conventions: {stream: where its rows come from}; of the router's streams also how it chooses.
        routing: {layer: how its router chooses experts by their logits}, a `frame.routing.Routing` for each layer with
            experts; its `scoring` is "unknown" where vLLM does not say, or its experts do not follow from what it says.
        spec: What was asked for; with a Spec for each prompt, that of the first, see `Sample.spec`.
        model: Name, revision and dtype of the model.
        seconds: Time of the call by part: `start` (the engine prepares), `generate`, `finish` (the engine hands over
            while the outputs are read; of which `wait` was for the last transfer), `check` (labels compared with them).
    """

    # As long as nothing else is known, which is what hints go by.
    has_final_norm = has_experts = True
    specs: Sequence[Spec] | None = None
    """Specs by sample, where these are not all alike."""

    first_sample = 0
    """Number of its first sample among the prompts of a stream, whose captures have one sample each."""

    shard_writer: ShardWriter | None = None
    """Has the workers write the rows, where they were left there for a dataset."""

    def __init__(
        self,
        spec: Spec,
        outputs: list[Any],
        sequences: Sequences,
        ranks: Sequence[RowSource],
        conventions: dict[str, str],
        routing: dict[int, Routing],
        streams: list[str],
        num_layers: int,
        has_final_norm: bool,
    ) -> None:
        self.spec, self.outputs, self.sequences, self.conventions = spec, outputs, sequences, conventions
        self.routing, self.num_layers, self.has_final_norm = routing, num_layers, has_final_norm
        self.has_experts = bool(routing)
        self.seconds: dict[str, float] = {}
        self.model: dict[str, str] = {}
        self._owner: dict[Place, RowSource] = {}
        for rank in ranks:
            for place in rank.places:
                self._owner[place] = rank
        self.layers = {name: sorted(layer for stream, layer in self._owner if stream == name) for name in streams}

    if not TYPE_CHECKING:  # names that are not there stay unknown to type checkers

        def __getattr__(self, name: str) -> Any:
            raise not_of_samples(self, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": self._owned(0, self.num_rows, tuple(self.layers))}

    def _owned(self, start: int, stop: int, streams: Sequence[str]) -> dict[Place, RowSource]:
        """Return some rows of some streams as what owns them."""
        tensors = {place: self.rows(*place, start, stop) for place in self._owner if place[0] in streams}
        return dict.fromkeys(tensors, OwnedRows(tensors))

    def _only(self, number: int, streams: Sequence[str]) -> Capture:
        """Return a capture of one sequence of this one, and of some streams."""
        only = Capture.__new__(Capture)
        only.__dict__.update(self.__dict__)
        sample, _ = self.sequences.keys[number]
        start, stop = (int(bound) for bound in self.sequences.wanted_starts[number : number + 2])
        only._owner = self._owned(start, stop, streams)
        only.outputs, only.sequences = [self.outputs[sample]], self.sequences.only(number)
        only.layers = {name: self.layers[name] for name in streams}
        only.specs = None if self.specs is None else [self.specs[sample]]
        return only

    def __len__(self) -> int:
        return len(self.outputs)

    def __getitem__(self, index: Any) -> Any:
        """Return the sample of a prompt; with `n > 1`, its first completion (see `sample`)."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a capture of {len(self)} prompts")
        return self.sample(index % len(self))

    def sample(self, index: int, completion: int = 0) -> Sample:
        """Return the rows of one completion of a prompt; negative numbers count from the last prompt.

        Raises:
            RowsMissingError: There is no such completion.
        """
        sample = index + len(self) if index < 0 else index
        try:
            return Sample(self, self.sequences.slots[sample, completion])
        except KeyError:
            raise RowsMissingError(
                f"sample {index} of {len(self)} has no completion {completion}", sample=index
            ) from None

    def each_completion(self) -> Iterator[Sample]:
        """Yield the samples of all completions of all prompts, in order."""
        return (self.sample(*slot) for slot in self.sequences.slots)

    def rows(self, stream: str, layer: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows of a layer over all samples, sample after sample; `start` and `stop` are those of a slice.

        `row_labels` says which sample, position and token each of them is of.

        Returns:
            Tensor [R, D] in the stream's dtype, CPU; see `LayerMap` for its lifetime.

        Raises:
            LayerError: The layer is not in this capture.

        Source:
            See `conventions`.

        Cost:
            No copy when the rows lie in one block, else one gather.
        """
        self.require(stream)
        owner = self._owner_of(stream, layer)
        if owner is None:
            raise self.no_layer(stream, layer)
        start, stop, _ = slice(start, stop).indices(self.num_rows)
        return owner.rows(stream, self._absolute(layer), start, max(stop, start))

    def no_layer(self, stream: str, layer: Any) -> LayerError:
        """Return what to raise for a layer that this capture does not have."""
        return LayerError(
            f"layer {layer} was not captured: {stream} of {self._name} has layers {self.layers[stream]}. "
            f"{hints.for_layer(self, stream, self._absolute(layer))}",
            layer=layer,
        )

    @property
    def _name(self) -> str:
        return "this result" if self.specs is None else f"samples with {self.spec}"

    def row_labels(
        self, start: int = 0, stop: int | None = None, *, stream: str | None = None, layer: int | None = None
    ) -> RowLabels:
        """Return what the rows of `rows(stream, layer, start, stop)` are: sample, completion, position and token.

        Args:
            start: As for `rows`.
            stop: As for `rows`.
            stream: Needed where samples have Specs of their own with different streams or layers; as for `rows`.
            layer: The same.

        Returns:
            RowLabels: tensors [R], CPU, of their own.

        Cost:
            Some numpy calls.
        """
        sequences = self.sequences
        flat = sequences.wanted[slice(start, stop)]
        numbers, positions = sequences.position_of(flat)
        slots = np.array(sequences.keys, np.int64).reshape(-1, 2)
        samples, completions = (torch.from_numpy(column[numbers]) for column in slots.T)
        tokens = torch.from_numpy(sequences.token_ids[flat])
        return RowLabels(samples, completions, torch.from_numpy(positions.astype(np.int32)), tokens)

    def _owner_of(self, stream: str, layer: object) -> RowSource | None:
        """Return who has the rows of a layer; None if it is not in this capture, or no number."""
        return self._owner.get((stream, self._absolute(layer)))

    def _absolute(self, layer: Any) -> int:
        """Return the number of a layer from the first on; -1 for what is no layer's number."""
        try:
            number = operator.index(layer)
        except TypeError:
            return -1
        return number + self.num_layers if number < 0 else number

    def require(self, stream: str) -> None:
        """Refuse a stream that is not in this capture.

        Raises:
            SpecError: Not captured.
        """
        if stream not in self.layers:
            raise SpecError(hints.for_stream(self, stream, self._name))

    def places_of_ranks(self) -> dict[RowSource, list[Place]]:
        """Return the streams and layers of each source of rows."""
        found: dict[RowSource, list[Place]] = {}
        for place, owner in self._owner.items():
            found.setdefault(owner, []).append(place)
        return found

    def number_from(self, first_sample: int) -> None:
        """Give the samples the numbers that they have among more of them."""
        self.first_sample = first_sample

    def save(self, path: Any, *, metadata: Sequence[Mapping[str, Any] | None] | None = None) -> None:
        """Write everything into a new dataset, which `vllm_tap.open_dataset` reads; it is there whole or not at all.

        Args:
            path: A folder, or a URL that fsspec knows.
            metadata: A mapping that JSON can hold, or None, for each sample; it becomes `Sample.metadata`.

        Raises:
            DatasetError: The folder holds a dataset already, cannot be written to, or the disk is full; or samples have
                different Specs.

        Source:
            See `conventions`, which the dataset repeats.

        Cost:
            One pass over the rows to write them, and one for their checksums. Ends when the disk has them.
        """
        from vllm_tap.client.identity import versions
        from vllm_tap.store.save import save

        if self.specs is not None:
            raise DatasetError(
                "samples of this capture have different Specs, and a dataset has one: capture the prompts of each Spec "
                "in a call of their own to save them."
            )
        save(self, path, model=self.model, versions=versions(), metadata=metadata)

    @property
    def num_rows(self) -> int:
        """Token positions over all samples and completions."""
        return len(self.sequences.wanted)

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows of all streams."""
        return sum(self.rows(s, layer, 0, 1).nbytes * self.num_rows for s, layer in self._owner if self.num_rows)

    def __repr__(self) -> str:
        return f"<Capture: {len(self)} samples, {self.num_rows} rows, layers {self.layers}>"
