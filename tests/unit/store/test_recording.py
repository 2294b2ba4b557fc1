"""Recording piece by piece: what is gone on with, what is refused, and what is left when it fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthetic_rows import MODEL, SyntheticCapture, check_dataset, prompts_of
from vllm_tap.errors import BudgetError, DatasetError, SpecError
from vllm_tap.spec import Spec
from vllm_tap.store import local
from vllm_tap.store.dataset import Dataset, open_dataset
from vllm_tap.store.pieces import pieces
from vllm_tap.store.recording import Run, record_with
from vllm_tap.store.verify import verify

PROMPTS = prompts_of(14)
RUN = Run(SyntheticCapture([]).spec, MODEL, "max_tokens=4", {"vllm_tap": "0"})


class Engine:
    """Captures prompts, and remembers which; fails at one of its calls."""

    def __init__(self, fails_at: int = -1, error: BaseException | None = None) -> None:
        self.calls: list[list[str]] = []
        self._fails_at, self._error = fails_at, error

    def __call__(self, prompts: list[str]) -> SyntheticCapture:
        self.calls.append(list(prompts))
        if len(self.calls) - 1 == self._fails_at:
            assert self._error is not None
            raise self._error
        return SyntheticCapture(prompts)


def record(
    path: Any, engine: Any = SyntheticCapture, prompts: Any = PROMPTS, run: Run = RUN, **options: Any
) -> Dataset:
    """Record prompts, five at a time."""
    return record_with(engine, prompts, path, run, **{"batch": 5, "resume": True, **options})


def test_what_is_sealed_is_not_captured_again(tmp_path: Path) -> None:
    """After an error of the engine, the next call goes on behind it, also with pieces of another size."""
    with pytest.raises(RuntimeError, match="engine"):
        record(tmp_path, Engine(2, RuntimeError("engine")))
    check_dataset(open_dataset(tmp_path), PROMPTS[:10])
    engine = Engine()
    check_dataset(record(tmp_path, engine, batch=3), PROMPTS)
    assert engine.calls == [PROMPTS[10:12], PROMPTS[12:]]
    engine = Engine()
    check_dataset(record(tmp_path, engine), PROMPTS)
    assert engine.calls == []


def test_a_prompt_that_is_refused_has_its_number_among_all(tmp_path: Path) -> None:
    """Not that within its piece."""
    with pytest.raises(SpecError, match=r"^prompt 11 of 3 is odd") as caught:
        record(tmp_path, Engine(2, SpecError("prompt 1 of 3 is odd", sample=1)))
    assert caught.value.sample == 11


def test_prompts_are_read_piece_by_piece(tmp_path: Path) -> None:
    """An iterable of any length: no prompt of a later piece has been asked for when a piece is captured."""
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for read, prompt in enumerate(PROMPTS, 1):  # noqa: B007
            yield prompt

    seen = []

    def engine(prompts: list[str]) -> SyntheticCapture:
        seen.append(read)
        return SyntheticCapture(prompts)

    check_dataset(record(tmp_path, engine, endless()), PROMPTS)
    assert seen == [6, 11, 14]  # one more is looked at to know that a piece is full


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    """Each records its pieces; together they are the dataset, whatever the order."""
    for index in (2, 0, 1):
        record(tmp_path, batch=2, share=(index, 3))
    check_dataset(open_dataset(tmp_path), PROMPTS)
    assert verify(tmp_path).problems == []
    with pytest.raises(SpecError, match=r"share=\(3, 3\)"):
        record(tmp_path, share=(3, 3))


def test_prompts_are_told_apart_by_what_they_hold() -> None:
    """Texts, token ids, arrays and conversations; of an image its kind is all that is looked at."""
    prompts = ["a", [1, 2], np.array([1, 3]), [{"role": "user", "content": "a"}], {"prompt": "a"}, {"x": object()}]
    digests = [next(pieces([prompt], None, [], 1)).digest for prompt in prompts]
    assert len(set(digests)) == len(prompts)
    assert digests[2] == next(pieces([[1, 3]], None, [], 1)).digest


def test_two_writers_of_the_same_samples(tmp_path: Path) -> None:
    """The second one is refused, and what the first one sealed stays."""

    def engine(prompts: list[str]) -> SyntheticCapture:
        if not list(tmp_path.glob("part-*")):
            record(tmp_path, prompts=PROMPTS[:5])
        return SyntheticCapture(prompts)

    with pytest.raises(DatasetError, match=r"is there already.*share"):
        record(tmp_path, engine, PROMPTS[:5])
    check_dataset(open_dataset(tmp_path), PROMPTS[:5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": RUN._replace(model={"name": "another"})}, r"model\['name'\] is 'synthetic' there and 'another' here"),
        ({"run": RUN._replace(spec=Spec(hidden_states="all"))}, "spec is"),
        ({"run": RUN._replace(sampling="max_tokens=5")}, "sampling is 'max_tokens=4' there"),
        ({"prompts": [*PROMPTS[:3], "other", *PROMPTS[4:]]}, "samples 0 to 4 were recorded from other prompts"),
        ({"prompts": PROMPTS[:7]}, "samples up to 13, and there are 7 prompts"),
        ({"metadata": [{"a": 1}] * 14}, "other prompts or metadata"),
        ({"resume": False}, "pass resume=True"),
    ],
    ids=["model", "spec", "sampling", "prompt", "fewer prompts", "metadata", "no resume"],
)
def test_another_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Before the engine is asked for anything, and with what differs."""
    record(tmp_path)
    engine = Engine()
    with pytest.raises(DatasetError, match=message):
        record(tmp_path, engine, **changes)
    assert engine.calls == []
    check_dataset(open_dataset(tmp_path), PROMPTS)


def test_arguments_that_cannot_be(tmp_path: Path) -> None:
    """No prompts, no batch, and metadata that are not as many."""
    with pytest.raises(SpecError, match="no prompts"):
        record(tmp_path, prompts=[])
    with pytest.raises(SpecError, match="batch"):
        record(tmp_path, batch=0)
    with pytest.raises(SpecError, match="not as many"):
        record(tmp_path, metadata=[{}])
    with pytest.raises(DatasetError, match="kept as JSON"):
        record(tmp_path, metadata=[{"a": object()}] * 14)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says so; what was sealed can be read, no draft is left, and there is room the next time."""
    taken = 0

    def fallocate(fd: int, start: int, nbytes: int) -> None:
        nonlocal taken
        taken += 1
        if taken > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(local.os, "posix_fallocate", fallocate)
        with pytest.raises(DatasetError, match=r"No space left.*resume=True"):
            record(tmp_path)
    check_dataset(open_dataset(tmp_path), PROMPTS[:5])
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "part-000000000000"}
    check_dataset(record(tmp_path), PROMPTS)


def test_no_permission_and_no_folder(tmp_path: Path) -> None:
    """A place that cannot be a folder, and one that goes while it is written to."""
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=r"file"):
        record(tmp_path / "file" / "run")

    def engine(prompts: list[str]) -> SyntheticCapture:
        if prompts[0] == PROMPTS[10]:
            (tmp_path / "run").rename(tmp_path / "moved")
            (tmp_path / "run").touch()
        return SyntheticCapture(prompts)

    with pytest.raises(DatasetError):
        record(tmp_path / "run", engine)
    moved = open_dataset(tmp_path / "moved")
    assert len(moved) in (5, 10)
    check_dataset(moved, PROMPTS[: len(moved)])


def test_ctrl_c_leaves_a_dataset_to_go_on_with(tmp_path: Path) -> None:
    """What was sealed stays, and no draft."""
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, Engine(2, KeyboardInterrupt()))
    assert not list(tmp_path.glob(".draft-*"))
    check_dataset(record(tmp_path), PROMPTS)


def test_rows_that_take_all_room_are_written_first(tmp_path: Path) -> None:
    """A piece that does not fit beside the one before is captured again when that one is written."""
    engine = Engine(1, BudgetError("full"))
    check_dataset(record(tmp_path, engine), PROMPTS)
    assert engine.calls[1] == engine.calls[2] == PROMPTS[5:10]
    with pytest.raises(BudgetError):
        record(tmp_path / "first", Engine(0, BudgetError("full")))


def test_drafts_of_killed_writers_are_removed_and_others_stay(tmp_path: Path) -> None:
    """A lock tells them apart."""
    place = local.LocalPlace(tmp_path)
    alive, dead = place.draft("part-000000000007"), place.draft("part-000000000008")
    os.close(dead._lock)  # as at the end of a process
    assert place.clean() == 1
    assert len(list(tmp_path.glob(".draft-*"))) == 1
    alive.discard()
    assert not list(tmp_path.glob(".draft-*"))
