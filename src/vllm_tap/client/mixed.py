"""The result of a capture whose samples have different streams or layers. Client process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from vllm_tap.client.result import Capture, RowLabels, Sample
from vllm_tap.errors import DatasetError, SpecError


class MixedCapture(Capture):
    """Samples of several captures, each with the streams and layers that its own Spec asked for.

    Args:
        parts: Captures of the samples that have the same streams and layers; their `outputs` have None for others.
        outputs: Of all samples.
    """

    def __init__(self, parts: Sequence[Capture], outputs: list[Any]) -> None:
        self.__dict__.update(parts[0].__dict__)  # what is known of the model
        self._parts, self.outputs = list(parts), outputs
        self._owner = {}
        self._part_of = {slot: part for part in parts for slot in part.sequences.slots}
        places = {place for part in parts for name in part.layers for place in ((name, n) for n in part.layers[name])}
        names = dict.fromkeys(name for part in parts for name in part.layers)
        self.layers = {name: sorted(layer for stream, layer in places if stream == name) for name in names}
        self.conventions = {name: text for part in parts for name, text in part.conventions.items()}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def sample(self, index: int, completion: int = 0) -> Sample:
        """Return the rows of one completion of a prompt; negative numbers count from the last prompt."""
        number = index + len(self) if index < 0 else index
        return self._part_of.get((number, completion), self._parts[0]).sample(number, completion)

    def each_completion(self) -> Iterator[Sample]:
        """Yield the samples of all completions of all prompts, in order."""
        return (self.sample(*slot) for slot in sorted(self._part_of))

    def rows(self, stream: str, layer: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows of a layer over all samples that have it; `row_labels(stream=..., layer=...)` says which.

        Returns:
            Tensor [R, D] in the stream's dtype, CPU.

        Raises:
            LayerError: No sample has the layer.
            SpecError: No sample has the stream, or some have it in another dtype than others.

        Source:
            See `conventions`.

        Cost:
            Where samples with different streams and layers have it, two copies.
        """
        parts = self._with(stream, layer)
        if len(parts) == 1:
            return parts[0].rows(stream, layer, start, stop)
        found = [part.rows(stream, layer) for part in parts]
        if len({rows.dtype for rows in found}) > 1:
            raise SpecError(f"{stream} has a dtype for some samples and another for others: read it sample by sample.")
        return torch.cat(found)[self._order(parts)][start:stop]

    def row_labels(
        self, start: int = 0, stop: int | None = None, *, stream: str | None = None, layer: int | None = None
    ) -> RowLabels:
        """Return what the rows of `rows(stream, layer, start, stop)` are.

        Raises:
            SpecError: No stream and layer, by which samples differ here.
        """
        if stream is None or layer is None:
            raise SpecError(
                "samples of this result have different streams or layers: row_labels(stream=..., layer=...)."
            )
        parts = self._with(stream, layer)
        order = self._order(parts)
        labels = zip(*(part.row_labels() for part in parts), strict=True)
        return RowLabels(*(torch.cat(column)[order][start:stop] for column in labels))

    def _with(self, stream: str, layer: int) -> list[Capture]:
        self.require(stream)
        parts = [part for part in self._parts if stream in part.layers and part._owner_of(stream, layer) is not None]
        if not parts:
            raise self.no_layer(stream, layer)
        return parts

    @staticmethod
    def _order(parts: Sequence[Capture]) -> torch.Tensor:
        """Return the order of the parts' rows, one part behind the other, by sample and completion."""
        labels = [part.row_labels() for part in parts]
        completions = torch.cat([label.completions for label in labels])
        by_completion = torch.argsort(completions, stable=True)
        samples = torch.cat([label.samples for label in labels])[by_completion]
        return by_completion[torch.argsort(samples, stable=True)]

    def number_from(self, first_sample: int) -> None:
        """Give the samples the numbers that they have among more of them."""
        for part in self._parts:
            part.number_from(first_sample)

    def save(self, path: Any, *, metadata: Sequence[Mapping[str, Any] | None] | None = None) -> None:
        """Refuse: a dataset has one Spec.

        Raises:
            DatasetError: Always.
        """
        raise DatasetError(
            "samples of this capture have different streams or layers, and a dataset has one Spec: capture the prompts "
            "of each Spec in a call of their own to save them."
        )

    @property
    def num_rows(self) -> int:
        """Token positions over all samples and completions."""
        return sum(part.num_rows for part in self._parts)

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows of all streams."""
        return sum(part.num_bytes for part in self._parts)
