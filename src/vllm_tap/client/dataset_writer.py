"""`DatasetWriter`: samples from anywhere into a dataset, as they come. In a process that needs no engine."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Final

from vllm_tap.client.bounds import whole_number
from vllm_tap.client.identity import versions
from vllm_tap.client.joined import joined
from vllm_tap.client.result import Capture, Sample
from vllm_tap.client.tap import RowBlock
from vllm_tap.errors import DatasetError, SpecError
from vllm_tap.store import index
from vllm_tap.store.facts import Facts, encode, facts_of, require_same
from vllm_tap.store.part import Part, sealed_parts
from vllm_tap.store.pieces import Metadata
from vllm_tap.store.place import PartTakenError, part_name
from vllm_tap.store.places import place_of
from vllm_tap.store.writer import write_part

PART_BYTES: Final = 256 << 20

SAID: Final = ("text", "finish_reason", "weight_versions")
"""Facts that an output may state of a completion, and a dataset keeps."""


class DatasetWriter:
    """Writes samples of captures, of streams, or of a server into a dataset.

    Each sample that is added becomes one of the dataset, in this order; its completion has the number 0 there. Samples
    are held until they fill a part, which then is on the disk whole or not at all. Leaving the `with` block writes the
    rest, also after an error; Ctrl-C leaves it out. Threads may share a writer, and processes a folder of their host.

    Args:
        path: A folder, or a URL that fsspec knows, into which one writer writes at a time.
        resume: Whether to go on behind the samples of a dataset that is there. Without one, a new one begins.
        part_bytes: Bytes of rows from which on the samples that are held become a part.

    Raises:
        DatasetError: There is a dataset already and `resume` is not set, or one that `record` has written; or pyarrow
            is missing.
        SpecError: `part_bytes` is no positive whole number.
    """

    def __init__(self, path: Any, *, resume: bool = False, part_bytes: int = PART_BYTES) -> None:
        index.require_pyarrow()
        self._place, self._part_bytes = place_of(path), whole_number("part_bytes", part_bytes)
        sealed = sealed_parts(self._place)
        if sealed and not resume:
            raise DatasetError(
                f"{self._place.path} holds a dataset already: pass resume=True to go on behind it, or another folder.",
                path=self._place.path,
            )
        self._place.clean()
        self._facts: Facts | None = sealed[0].facts() if sealed else None
        if self._facts is not None and "config_sha256" in self._facts.model:
            raise DatasetError(
                f"{self._place.path} was written by record, which states more of the model than samples know: give "
                "another folder.",
                path=self._place.path,
            )
        self._parts, self._next = self._place.parts(), _end_of(sealed)
        self._held: list[tuple[Capture, Metadata]] = []
        self._num_bytes = 0
        self._is_closed = False
        self._lock = threading.Lock()

    def add(
        self, samples: Sample | Iterable[Sample], metadata: Mapping[str, Any] | Iterable[Metadata] | None = None
    ) -> None:
        """Add samples; write a part when there are enough.

        Args:
            samples: A sample or several, such as a `Capture`, or what `HttpTap.samples` returns.
            metadata: A mapping that JSON can hold, for each of the samples; or one for each, or None. It becomes
                `Sample.metadata`.

        Raises:
            SpecError: Something else, or as many metadata as samples are needed; nothing of this call was added. Or the
                writer was closed.
            DatasetError: Samples of another model or `Spec` than those before, or metadata that JSON does not hold:
                nothing was added. Or the part cannot be written: what was added is held, for `flush`.

        Cost:
            Rows that lie together are not copied before they are written: until then, the memory of their capture
            stays in use. A part is written in the calling thread.
        """
        given = _listed(samples)
        of_each = _metadata(metadata, len(given))
        with self._lock:
            if self._is_closed:
                raise SpecError("this writer was closed: samples go to another, with resume=True.")
            facts = self._facts
            parts: list[tuple[Capture, Metadata]] = []
            for sample, one in zip(given, of_each, strict=True):
                part = _alone(sample)
                found = facts_of(part, part.model, "", versions())
                if not found.streams:
                    raise DatasetError("there is nothing to write of a sample that has no stream.")
                if facts is None:
                    encode(found)
                    facts = found
                require_same(found, facts, self._place.path)
                parts.append((part, _kept(one)))
            self._facts = facts
            self._held += parts
            self._num_bytes += sum(part.num_bytes for part, _ in parts)
            if self._num_bytes >= self._part_bytes:
                self._write()

    def flush(self) -> None:
        """Write what is held as a part, which is on the disk then.

        Raises:
            DatasetError: It cannot be written; it is held still.
        """
        with self._lock:
            self._write()

    def close(self) -> None:
        """Write what is held, as `flush` does, and take no more."""
        with self._lock:
            self._write()
            self._is_closed = True

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            return
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"(and {len(self._held)} samples that were held could not be written: {failure})")

    def _write(self) -> None:
        """Write what is held behind all that is sealed, also by others meanwhile."""
        if not self._held:
            return
        source = _together([part for part, _ in self._held])
        facts = facts_of(source, source.model, "", versions())
        given = [one for _, one in self._held]
        metadata = given if any(one is not None for one in given) else None
        while True:
            self._look_again(facts)
            try:
                write_part(
                    self._place, source, facts, first_sample=self._next, metadata=metadata, on_sealed=self._forget
                )
                return
            except PartTakenError:
                if self._place.parts() == self._parts:  # nobody else has written
                    raise

    def _look_again(self, facts: Facts) -> None:
        """Find the end of what is sealed, if others may have written since this was done last."""
        if (parts := self._place.parts()) != self._parts:
            sealed = sealed_parts(self._place)
            if sealed:
                require_same(facts, sealed[0].facts(), self._place.path)
            self._parts, self._next = parts, _end_of(sealed)

    def _forget(self) -> None:
        """Let go of what is held, which is sealed now."""
        self._parts = sorted([*self._parts, part_name(self._next)])
        self._next += len(self._held)
        self._held, self._num_bytes = [], 0


def _end_of(sealed: Sequence[Part]) -> int:
    """Return the number of the first sample behind parts."""
    return sealed[-1].manifest.first_sample + sealed[-1].manifest.num_samples if sealed else 0


def _kept(metadata: Metadata) -> Metadata:
    """Return metadata of one's own, as a dataset will have them.

    Raises:
        DatasetError: JSON does not hold them.
    """
    text = index.metadata_text(metadata)
    return None if text is None else json.loads(text)


def _listed(samples: Any) -> list[Sample]:
    """Return samples as a list; of a capture, those of all completions.

    Raises:
        SpecError: They are something else.
    """
    if isinstance(samples, Capture):
        return list(samples.each_completion())
    is_many = isinstance(samples, Iterable) and not isinstance(samples, str | Mapping)
    listed = list(samples) if is_many else [samples]
    for one in listed:
        if not isinstance(one, Sample) or isinstance(one, RowBlock):
            raise SpecError(f"add takes captured samples, or a Capture, got a {_kind(one)}.")
    return listed


def _kind(given: Any) -> str:
    return f"{type(given).__module__}.{type(given).__qualname__}".removeprefix("builtins.")


def _metadata(given: Any, num_samples: int) -> list[Metadata]:
    """Return the metadata of each sample.

    Raises:
        SpecError: They are not as many.
    """
    if given is None or isinstance(given, Mapping):
        return [given] * num_samples
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise SpecError(f"metadata are a mapping, or one for each sample, got a {_kind(given)}.")
    listed = list(given)
    if len(listed) != num_samples:
        raise SpecError(f"{len(listed)} metadata for {num_samples} samples: pass one for each, or one for all.")
    return listed


def _alone(sample: Sample) -> Capture:
    """Return a sample as a capture of its own, with what a dataset keeps of its output."""
    alone, output = sample._alone()._capture, sample.output
    alone.spec, alone.specs = sample.spec, None
    ends = getattr(output, "outputs", None)
    ends = [one for one in ends if one.index == sample.completion] if isinstance(ends, list | tuple) else []
    completions = [
        SimpleNamespace(index=0, token_ids=list(one.token_ids), **{name: getattr(one, name, None) for name in SAID})
        for one in ends
    ]
    for text in (getattr(output, "prompt", None), *(one.text for one in completions)):
        _require_utf8(text)
    alone.outputs = [
        SimpleNamespace(
            request_id=output.request_id,
            prompt=getattr(output, "prompt", None),
            prompt_token_ids=[] if output.prompt_token_ids is None else list(output.prompt_token_ids),
            outputs=completions,
        )
    ]
    return alone


def _require_utf8(text: Any) -> None:
    """Refuse a text that no file can hold.

    Raises:
        DatasetError: It has half of a pair of surrogates.
    """
    try:
        str(text).encode()
    except UnicodeEncodeError as error:
        raise DatasetError(f"a text cannot be kept: {error}") from error


def _together(parts: list[Capture]) -> Capture:
    """Return captures of one sample each as one, whose samples are these in order."""
    numbered = []
    for number, part in enumerate(parts):
        one = copy.copy(part)
        one.sequences = copy.copy(part.sequences)
        one.sequences.slots = {(number, 0): 0}
        one.sequences.request_ids = {number: part.outputs[0].request_id}
        numbered.append(one)
    return joined(numbered, [part.outputs[0] for part in parts])
