"""A capture as a dataset's writer sees it: facts, sequences and rows. In the process that writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import DatasetError
from vllm_tap.spec import Spec
from vllm_tap.store.facts import StreamFacts
from vllm_tap.store.manifest import FileFacts


class FlatSequences(Protocol):
    """Sequences behind one another; see `client.sequences.Sequences`, which is one."""

    slots: dict[tuple[int, int], int]
    request_ids: dict[int, str]
    starts: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int32]
    wanted: npt.NDArray[np.int64]
    wanted_starts: npt.NDArray[np.int64]

    def position_of(self, flat: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the sequence number and the position of flat indices."""


AUTO, CLIENT, WORKERS = "auto", "client", "workers"

WRITERS: Final = (AUTO, CLIENT, WORKERS)
"""Who may write the shards of a dataset, by the names that users choose from."""


class ShardWriter(Protocol):
    """Way to have the shards of a source written by who holds its rows."""

    def write(
        self, folder: str, streams: Sequence[StreamFacts], num_rows: int, is_stopped: Callable[[], bool]
    ) -> list[FileFacts]:
        """Have all of them written into a draft; return what is known of the files, which the disk has.

        Raises:
            DatasetError: They cannot be written.
            StoppedError: `is_stopped` said so. Nobody writes any more then, nor after any other error.
        """
        ...


class RowSource(Protocol):
    """Rows of samples, with all that is known of them. `Capture` is one.

    Attributes:
        shard_writer: Has its shards written elsewhere; None if its rows are here.
    """

    shard_writer: ShardWriter | None

    spec: Spec
    layers: dict[str, list[int]]
    num_layers: int
    has_final_norm: bool
    conventions: dict[str, str]
    routing: Any
    outputs: list[Any]

    @property
    def sequences(self) -> FlatSequences:
        """Return the sequences whose rows these are."""

    def rows(self, stream: str, layer: int, start: int = 0, stop: int | None = None) -> Any:
        """Return rows `start` to `stop` of a layer, over all sequences: a tensor or an array [R, width]."""


class Labels(NamedTuple):
    """Labels of the rows of a part; see `shard.label_arrays` for shapes."""

    starts: npt.NDArray[np.int64]
    samples: npt.NDArray[np.int64]
    completions: npt.NDArray[np.int32]
    prompt_lens: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    token_ids: npt.NDArray[np.int32]


class Texts(NamedTuple):
    """Entries of an index for one sequence, beside numbers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    text: str | None
    generated_token_ids: list[int]
    finish_reason: str | None
    metadata: Mapping[str, Any] | None
    weight_versions: list[tuple[str, int, int]] | None


def labels_of(source: RowSource, first_sample: int) -> Labels:
    """Return the labels of a source whose samples are numbered from `first_sample` on."""
    sequences = source.sequences
    keys = sorted(sequences.slots, key=lambda key: sequences.slots[key])
    _, positions = sequences.position_of(sequences.wanted)
    return Labels(
        starts=sequences.wanted_starts.astype(np.int64),
        samples=np.array([sample + first_sample for sample, _ in keys], np.int64),
        completions=np.array([completion for _, completion in keys], np.int32),
        prompt_lens=np.array([len(_prompt_ids(source, sample)) for sample, _ in keys], np.int32),
        positions=positions.astype(np.int32),
        token_ids=sequences.token_ids[sequences.wanted].astype(np.int32),
    )


def texts_of(source: RowSource, metadata: Sequence[Mapping[str, Any] | None] | None) -> list[Texts]:
    """Return what the outputs say of each sequence, in the order of the labels.

    Args:
        source: The capture.
        metadata: The user's, by sample.

    Raises:
        DatasetError: As many metadata as samples are needed.
    """
    if metadata is not None and len(metadata) != len(source.outputs):
        raise DatasetError(f"{len(metadata)} metadata for {len(source.outputs)} samples: pass one for each.")
    slots = source.sequences.slots
    return [_texts(source, key, metadata) for key in sorted(slots, key=lambda key: slots[key])]


def _texts(source: RowSource, key: tuple[int, int], metadata: Sequence[Mapping[str, Any] | None] | None) -> Texts:
    sample, number = key
    output = source.outputs[sample]
    completions = getattr(output, "outputs", None)
    completion = None
    if isinstance(completions, list):
        completion = next((one for one in completions if one.index == number), None)
    return Texts(
        request_id=source.sequences.request_ids.get(sample, ""),
        prompt=getattr(output, "prompt", None),
        prompt_token_ids=_prompt_ids(source, sample),
        text=getattr(completion, "text", None),
        generated_token_ids=list(getattr(completion, "token_ids", ())),
        finish_reason=getattr(completion, "finish_reason", None),
        metadata=metadata[sample] if metadata is not None else None,
        weight_versions=_weight_versions(completion),
    )


def _weight_versions(completion: Any) -> list[tuple[str, int, int]] | None:
    spans = getattr(completion, "weight_versions", None)
    return None if spans is None else [(span.version, span.start, span.end) for span in spans]


def _prompt_ids(source: RowSource, sample: int) -> list[int]:
    return list(source.outputs[sample].prompt_token_ids or ())
