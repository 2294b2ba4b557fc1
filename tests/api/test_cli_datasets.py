"""Commands on datasets: what they print, and their exit codes. Without an engine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from synthetic_rows import MODEL, SyntheticCapture, prompts_of
from vllm_tap import open_dataset
from vllm_tap.cli import main, record
from vllm_tap.client.progress import Bar, Progress
from vllm_tap.store.recording import Run, record_with


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of two parts."""
    run = Run(SyntheticCapture([]).spec, MODEL, "max_tokens=1", {"vllm_tap": "0"})
    record_with(SyntheticCapture, prompts_of(8), tmp_path / "run", run, batch=5, metadata=[{"label": "a"}] * 8)
    return tmp_path / "run"


def test_inspect_says_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Facts of the dataset for people and for programs."""
    assert main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "synthetic bfloat16" in text
    assert "24 x bfloat16, 2 layers: 0, 3" in text
    assert main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["samples"], facts["parts"], facts["streams"]["router_logits"]["layers"]) == (8, 2, [1])


def test_inspect_shows_a_sample(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its prompt, tokens and metadata; one that is not there is a line."""
    assert main(["inspect", str(folder), "--sample", "-1", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["sample"], row["prompt"], row["metadata"]) == (7, prompts_of(8)[7], {"label": "a"})
    assert main(["inspect", str(folder), "--sample", "8"]) == 1
    assert capsys.readouterr().err == "vllm-tap: sample 8 of a dataset of 8.\n"


def test_verify_finds_a_changed_byte(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, and the file's name; before, all is well."""
    assert main(["verify", str(folder)]) == 0
    capsys.readouterr()
    shard = folder / "part-000000000005" / "hidden_states.0003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["verify", str(folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["holds"] is False
    assert [problem for problem in found["problems"] if "hidden_states.0003" in problem] == found["problems"]


def test_record_refuses_before_an_engine_starts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that holds a dataset, without --resume; and a folder that is none."""
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a\n")
    assert main(["record", "/no/model", str(folder), "--prompts", str(prompts)]) == 1
    assert "add --resume" in capsys.readouterr().err
    assert main(["inspect", str(folder.parent)]) == 1
    assert "no sealed part" in capsys.readouterr().err


def test_a_part_is_told_on_a_line_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though the bar of the next part is shown by then, and goes on below it."""
    bar = Bar(lambda: Progress(3, 100, 0.0), lambda: 9)
    bar.make()
    for part in open_dataset(folder).parts:
        record._say(part.manifest)
        bar.tick()
    bar.close()
    lines = [line.strip() for line in re.split(r"[\r\n]", capsys.readouterr().err)]
    assert [line.partition(":")[0] for line in lines if "samples" in line] == ["samples 0 to 4", "samples 5 to 7"]
    assert any("3/9 rows" in line for line in lines[lines.index(next(x for x in lines if "samples 5" in x)) :])
