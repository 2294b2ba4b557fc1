"""Samples that are written as they come: parts, what is refused, and what is left when writing fails."""

from __future__ import annotations

import asyncio
import errno
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from synthetic_rows import LAYERS, MODEL, SyntheticCapture, check_dataset, prompts_of
from vllm_tap.client import dataset_writer
from vllm_tap.client.dataset_writer import DatasetWriter
from vllm_tap.client.mixed import MixedCapture
from vllm_tap.client.owned import OwnedRows
from vllm_tap.client.result import Capture
from vllm_tap.client.tap import RowBlock
from vllm_tap.errors import DatasetError, SpecError
from vllm_tap.spec import Spec
from vllm_tap.store import local
from vllm_tap.store.dataset import open_dataset
from vllm_tap.store.recording import Run, record_with
from vllm_tap.store.verify import verify

PROMPTS = prompts_of(14)


def captured(prompts: list[str], num_completions: int = 1, positions: str = "all") -> Capture:
    """Return rows of prompts as a capture has them."""
    source = SyntheticCapture(prompts, num_completions, positions)
    rows = OwnedRows({place: source.rows(*place) for place in ((s, n) for s, layers in LAYERS.items() for n in layers)})
    facts = source.conventions, source.routing, list(LAYERS), source.num_layers, source.has_final_norm
    result = Capture(source.spec, source.outputs, source.sequences, [rows], *facts)
    result.model = dict(MODEL)
    return result


def test_samples_of_many_captures_are_one_dataset(tmp_path: Path) -> None:
    """In the order in which they were added, with their metadata; parts are as large as asked for."""
    metadata = [{"number": number} for number in range(14)]
    with DatasetWriter(tmp_path, part_bytes=4000) as writer:
        for first in range(0, 14, 3):
            result = captured(PROMPTS[first : first + 3])
            writer.add(result[0], metadata[first])
            writer.add(result[1:], metadata[first + 1 : first + 3])
    dataset = open_dataset(tmp_path)
    check_dataset(dataset, PROMPTS)
    assert [sample.metadata for sample in dataset] == metadata
    assert dataset.facts.model == MODEL
    assert len(dataset.parts) > 2
    assert all(part.manifest.num_rows * 120 > 4000 for part in dataset.parts[:-1])
    assert verify(dataset.path).problems == []


def test_a_dataset_is_gone_on_with_if_that_is_asked_for(tmp_path: Path) -> None:
    """Behind what is sealed; nothing is begun without samples."""
    with DatasetWriter(tmp_path / "none") as writer:
        writer.add([])
    assert not list((tmp_path / "none").glob("part-*"))
    for first in (0, 5, 9):
        with DatasetWriter(tmp_path, resume=True) as writer:
            writer.add(captured(PROMPTS[first : {0: 5, 5: 9, 9: 14}[first]]))
    check_dataset(open_dataset(tmp_path), PROMPTS)
    with pytest.raises(DatasetError, match="pass resume=True to go on behind it"):
        DatasetWriter(tmp_path)


def test_each_completion_is_a_sample(tmp_path: Path) -> None:
    """As where the best of several is kept; with its own tokens, text, and rows."""
    result = captured(PROMPTS, num_completions=3)
    with DatasetWriter(tmp_path) as writer:
        writer.add(result, {"from": "all"})
        writer.add(result.sample(4, 2), {"from": "best"})
    dataset = open_dataset(tmp_path)
    kept = [(number, completion) for number in range(14) for completion in range(3)]
    assert len(dataset) == len(kept) + 1
    for sample, slot in zip(dataset, [*kept, (4, 2)], strict=True):
        theirs, output = result.sample(*slot), result.outputs[slot[0]]
        assert (sample.completion, sample.request_id, sample.prompt) == (0, str(slot[0]), PROMPTS[slot[0]])
        assert sample.prompt_token_ids == output.prompt_token_ids
        assert sample.generated_token_ids == output.outputs[slot[1]].token_ids
        assert sample.text == output.outputs[slot[1]].text
        assert sample.weight_versions == [(f"step {slot[1]}", 0, len(sample.generated_token_ids))]
        assert sample.positions.equal(theirs.positions)
        assert sample.token_ids.equal(theirs.token_ids)
        for stream, layers in LAYERS.items():
            for layer in layers:
                mine = getattr(sample, stream)[layer]
                assert torch.equal(mine.view(torch.uint8), getattr(theirs, stream)[layer].view(torch.uint8))
    assert dataset[-1].metadata == {"from": "best"}


def changed(**fields: Any) -> Capture:
    """Return a capture of one prompt, with something changed."""
    result = captured(PROMPTS[:1])
    for name, value in fields.items():
        setattr(result, name, value)
    return result


def said(text: str) -> Capture:
    """Return a capture of one prompt, of another text."""
    result = captured(PROMPTS[:1])
    result.outputs[0].outputs[0].text = text
    return result


@pytest.mark.parametrize(
    ("samples", "metadata", "error", "match"),
    [
        (lambda: captured(PROMPTS[:1], positions="last"), None, DatasetError, "rows of another run: spec is"),
        (lambda: changed(model={"name": "other"}), None, DatasetError, "rows of another run: model"),
        (lambda: changed(spec=Spec(hidden_states=[0])), None, DatasetError, "spec is"),
        (lambda: captured(PROMPTS[:3]), [{}], SpecError, "1 metadata for 3 samples"),
        (lambda: captured(PROMPTS[:3]), 5, SpecError, "metadata are a mapping, or one for each sample, got a int"),
        (lambda: captured(PROMPTS[:1]), {"a": "\ud83d"}, DatasetError, "cannot be kept as JSON"),
        (lambda: captured(PROMPTS[:1]), {"a": object()}, DatasetError, "cannot be kept as JSON"),
        (lambda: captured(PROMPTS[:2]), [{}, {"a": float("nan")}], DatasetError, "cannot be kept as JSON"),
        (lambda: RowBlock(captured(PROMPTS[:1]), 0), None, SpecError, r"got a vllm_tap\.client\.tap\.RowBlock"),
        (lambda: [captured(PROMPTS[:1])[0], "text"], None, SpecError, "got a str"),
        (lambda: changed(layers={}), None, DatasetError, "a sample that has no stream"),
        (lambda: said("\ud83d"), None, DatasetError, "a text cannot be kept"),
        (lambda: {"a": 1}, None, SpecError, "takes captured samples, or a Capture, got a dict"),
        (lambda: 7, None, SpecError, "takes captured samples, or a Capture, got a int"),
    ],
)
def test_what_does_not_belong_is_refused_and_not_added(
    tmp_path: Path, samples: Callable[[], Any], metadata: Any, error: type[Exception], match: str
) -> None:
    """Neither it, nor what was given with it; what was added before, and comes later, is written."""
    with DatasetWriter(tmp_path) as writer:
        writer.add(captured(PROMPTS[:5]))
        with pytest.raises(error, match=match):
            writer.add(samples(), metadata)
        writer.add(captured(PROMPTS[5:]))
    check_dataset(open_dataset(tmp_path), PROMPTS)


def test_samples_of_a_dataset_are_refused(tmp_path: Path) -> None:
    """Its parts can be moved as they are."""
    with DatasetWriter(tmp_path) as writer:
        writer.add(captured(PROMPTS))
    with DatasetWriter(tmp_path / "other") as writer, pytest.raises(SpecError, match=r"got a vllm_tap\.store\.sample"):
        writer.add(open_dataset(tmp_path)[0])  # type: ignore[arg-type]


def test_what_cannot_be_written_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it can be: nothing is lost, and nothing is written twice."""
    write, fails = dataset_writer.write_part, True

    def write_part(*args: Any, **options: Any) -> Any:
        if fails:
            raise DatasetError("the disk is full")
        return write(*args, **options)

    monkeypatch.setattr(dataset_writer, "write_part", write_part)
    writer = DatasetWriter(tmp_path, part_bytes=1)
    for first in range(4):
        with pytest.raises(DatasetError, match="the disk is full"):
            writer.add(captured(PROMPTS[first : first + 1]))
    with pytest.raises(DatasetError, match="full"):
        writer.flush()
    with pytest.raises(RuntimeError) as caught, writer:
        raise RuntimeError("of the user")
    assert "4 samples that were held could not be written: the disk is full" in caught.value.__notes__[0]
    fails = False
    writer.add(captured(PROMPTS[4:]))
    writer.close()
    check_dataset(open_dataset(tmp_path), PROMPTS)


ENDS = [(RuntimeError, True), (asyncio.CancelledError, True), (SystemExit, True), (KeyboardInterrupt, False)]


@pytest.mark.parametrize(("error", "is_written"), ENDS)
def test_an_error_in_the_block_loses_nothing(tmp_path: Path, error: type[BaseException], is_written: bool) -> None:
    """But Ctrl-C does not wait for a disk; what is sealed stays."""

    def write() -> None:
        with DatasetWriter(tmp_path) as writer:
            writer.add(captured(PROMPTS[:9]))
            writer.flush()
            writer.add(captured(PROMPTS[9:]))
            raise error

    with pytest.raises(error):
        write()
    check_dataset(open_dataset(tmp_path), PROMPTS if is_written else PROMPTS[:9])


def test_what_fails_behind_the_seal_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the folder itself cannot be synced."""
    sync, fails = local.sync_folder, True

    def sync_folder(folder: Any) -> None:
        sync(folder)
        if fails and Path(folder) == tmp_path:
            raise OSError(errno.EIO, "an error of the device")

    monkeypatch.setattr(local, "sync_folder", sync_folder)
    writer = DatasetWriter(tmp_path)
    writer.add(captured(PROMPTS[:9]))
    with pytest.raises(DatasetError, match="error of the device"):
        writer.flush()
    fails = False
    writer.add(captured(PROMPTS[9:]))
    writer.close()
    check_dataset(open_dataset(tmp_path), PROMPTS)


@pytest.mark.parametrize("part_bytes", [0, "1 GB", None])
def test_parts_have_a_size(tmp_path: Path, part_bytes: Any) -> None:
    """Said before anything is added."""
    with pytest.raises(SpecError, match="part_bytes is a positive whole number"):
        DatasetWriter(tmp_path, part_bytes=part_bytes)


def test_parts_of_others_are_not_taken_for_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However alike their samples are; what could not be written is held, and its error is the first one."""
    mine, theirs = (DatasetWriter(tmp_path, resume=True) for _ in range(2))
    mine.add(captured(PROMPTS[:1]), {"of": "mine"})
    theirs.add(captured(PROMPTS[:1]), {"of": "theirs"})
    write = dataset_writer.write_part

    def write_part(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(dataset_writer, "write_part", write)
        theirs.flush()
        (tmp_path / "part-000000000000" / "manifest.json").rename(tmp_path / "manifest")
        raise DatasetError("the disk is full")

    monkeypatch.setattr(dataset_writer, "write_part", write_part)
    with pytest.raises(DatasetError, match="the disk is full"):
        mine.flush()
    (tmp_path / "manifest").rename(tmp_path / "part-000000000000" / "manifest.json")
    mine.close()
    assert [sample.metadata["of"] for sample in open_dataset(tmp_path)] == ["theirs", "mine"]


def test_writers_in_turn_write_each_part_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They look for parts of others before, and not behind all rows."""
    written, write = [], dataset_writer.write_part

    def write_part(*args: Any, **options: Any) -> Any:
        written.append(options["first_sample"])
        return write(*args, **options)

    monkeypatch.setattr(dataset_writer, "write_part", write_part)
    writers = [DatasetWriter(tmp_path, resume=True, part_bytes=1) for _ in range(3)]
    for number, prompt in enumerate(PROMPTS):
        writers[number % 3].add(captured([prompt]))
    assert written == list(range(14))
    check_dataset(open_dataset(tmp_path), PROMPTS)


def test_a_closed_writer_takes_nothing(tmp_path: Path) -> None:
    """It would be lost."""
    with DatasetWriter(tmp_path) as writer:
        writer.add(captured(PROMPTS))
    writer.close()
    with pytest.raises(SpecError, match="this writer was closed"):
        writer.add(captured(PROMPTS))
    check_dataset(open_dataset(tmp_path), PROMPTS)


def test_captures_and_streams_share_a_part(tmp_path: Path) -> None:
    """Of which the one knows how long it took, and the other does not; metadata may be changed when they are added."""
    metadata = {}
    with DatasetWriter(tmp_path) as writer:
        for number, prompt in enumerate(PROMPTS):
            result = captured([prompt])
            if not number % 2:
                result.seconds = {"start": 1.0, "generate": 2.0}
            metadata["number"] = number
            writer.add(result, metadata)
    dataset = open_dataset(tmp_path)
    check_dataset(dataset, PROMPTS)
    assert [sample.metadata for sample in dataset] == [{"number": number} for number in range(14)]


def test_samples_of_many_specs_are_refused(tmp_path: Path) -> None:
    """All of them: a dataset has one Spec."""
    parts = [captured(PROMPTS[:2]), captured(PROMPTS[:2], positions="last")]
    for number, part in enumerate(parts):
        part.specs = [one.spec for one in parts]
        part.sequences.slots = {(number, 0): 0}
    mixed = MixedCapture(parts, parts[0].outputs)
    assert [sample.index for sample in mixed.each_completion()] == [0, 1]
    with DatasetWriter(tmp_path) as writer:
        with pytest.raises(DatasetError, match="spec is"):
            writer.add(mixed)
        writer.add(captured(PROMPTS))
    check_dataset(open_dataset(tmp_path), PROMPTS)


def test_a_dataset_of_record_is_not_gone_on_with(tmp_path: Path) -> None:
    """It states more of the model."""
    run = Run(SyntheticCapture([]).spec, {**MODEL, "config_sha256": "ab"}, "", {"vllm_tap": "0"})
    record_with(SyntheticCapture, PROMPTS, tmp_path, run)
    with pytest.raises(DatasetError, match="was written by record"):
        DatasetWriter(tmp_path, resume=True)


def test_writers_of_different_models_make_no_dataset_together(tmp_path: Path) -> None:
    """Also where both began in an empty folder: the second is told, and what the first wrote stays."""
    first, second = (DatasetWriter(tmp_path, resume=True) for _ in range(2))
    first.add(captured(PROMPTS))
    other = captured(PROMPTS)
    other.model = {"name": "other"}
    second.add(other)
    first.close()
    with pytest.raises(DatasetError, match="rows of another run: model"):
        second.close()
    check_dataset(open_dataset(tmp_path), PROMPTS)


def test_samples_without_rows_are_kept(tmp_path: Path) -> None:
    """As where a prompt has no such position, and that may be."""
    with DatasetWriter(tmp_path) as writer:
        result = captured(PROMPTS, positions="generated")
        writer.add(result)
    dataset = open_dataset(tmp_path)
    counts = [len(sample) for sample in dataset]
    assert counts == [len(sample) for sample in result]
    assert {0, 1} <= set(counts)


def test_writers_share_a_folder(tmp_path: Path) -> None:
    """Threads one writer, as processes writers of their own: each sample is there once."""
    many = prompts_of(48)

    def write(number: int, writer: DatasetWriter) -> None:
        for prompt in many[number::8]:
            writer.add(captured([prompt])[0], {"prompt": prompt})

    writers = [DatasetWriter(tmp_path, resume=True, part_bytes=2000) for _ in range(4)]
    threads = [threading.Thread(target=write, args=(number, writers[number % 4])) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for writer in writers:
        writer.close()
    dataset = open_dataset(tmp_path)
    found = [sample.prompt for sample in dataset]
    assert set(found) == set(many)
    check_dataset(dataset, found)
    assert [sample.metadata["prompt"] for sample in dataset] == found


def test_memory_is_let_go_of_with_the_part(tmp_path: Path) -> None:
    """And not before: rows lie where their capture has them."""
    writer, result = DatasetWriter(tmp_path), captured(PROMPTS)
    rows = result._owner["hidden_states", 0].rows("hidden_states", 0, 0, 5)
    alive = weakref.ref(rows.untyped_storage())
    writer.add(result)
    del rows, result
    assert alive() is not None
    writer.flush()
    assert alive() is None
    check_dataset(open_dataset(tmp_path), PROMPTS)


def test_a_dataset_may_be_anywhere() -> None:
    """As with `record`."""
    with DatasetWriter("memory://written-as-they-come", part_bytes=2000) as writer:
        for prompt in PROMPTS:
            writer.add(captured([prompt]))
    check_dataset(open_dataset("memory://written-as-they-come"), PROMPTS)
