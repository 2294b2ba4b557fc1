"""Exported folders by the definitions of their readers, which are not needed; `tests/interchange` has the readers.

Without an engine.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch

from made_rows import NUM_LAYERS, made
from runners import python_path
from vllm_tap import open_dataset
from vllm_tap.cli import main
from vllm_tap.errors import DatasetError, LayerError, PositionError, RowsMissingError, SpecError
from vllm_tap.interchange import export
from vllm_tap.interchange.source import sequences

LAYERS = [1, 3, 4]
"""Those of EAGLE-3 in a model of eight."""


@pytest.fixture(params=["capture", "dataset"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """The same rows in the process's memory and on the disk."""
    capture = made(num_completions=2)
    if request.param == "capture":
        return capture
    capture.save(tmp_path / "run")
    return open_dataset(tmp_path / "run")


def table(folder: Path) -> pa.Table:
    """Read the Arrow stream of a folder."""
    state = json.loads((folder / "state.json").read_text())
    return pa.ipc.open_stream(folder / state["_data_files"][0]["filename"]).read_all()


def masks(sample: Any) -> list[int]:
    """Return what counts: generated tokens."""
    return [int(position >= len(sample.output.prompt_token_ids)) for position in sample.positions.tolist()]


def test_speculators(source: Any, tmp_path: Path) -> None:
    """`hs_{i}.safetensors` has chosen layers and then the last, before the norm, beside int64 tokens."""
    facts = export(source, "speculators", tmp_path / "out")
    assert (facts["layers"], facts["target_layer_ids"], facts["last_layer_id"]) == (LAYERS, [2, 4, 5], NUM_LAYERS)
    rows = table(tmp_path / "out").to_pylist()
    assert len(rows) == facts["samples"] == 12
    for number, sample in enumerate(sequences(source)):
        read = safetensors.torch.load_file(tmp_path / "out" / "hidden_states" / f"hs_{number}.safetensors")
        expected = torch.stack([sample.hidden_states[layer] for layer in [*LAYERS, -1]], 1)
        assert torch.equal(read["hidden_states"], expected)
        assert read["token_ids"].dtype == torch.int64
        assert read["token_ids"].tolist() == sample.token_ids.tolist() == rows[number]["input_ids"]
        assert rows[number]["loss_mask"] == masks(sample)
        assert rows[number]["seq_len"] == len(sample)


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash", "dspark"])
def test_specforge(source: Any, tmp_path: Path, algorithm: str) -> None:
    """A `.ckpt` for each sequence, with the names of the algorithm; the last state is behind the norm."""
    export(source, "specforge", tmp_path / "out", algorithm=algorithm)
    paths = sorted((tmp_path / "out").glob("*.ckpt"))
    for path, sample in zip(paths, sequences(source), strict=True):
        read = torch.load(path, weights_only=True)
        aux = torch.cat([sample.hidden_states[layer] for layer in LAYERS], 1)
        final = sample.final_hidden_states
        named = {
            "eagle3": {"aux_hidden_state": aux[None], "hidden_state": final[None]},
            "dflash": {"hidden_states": aux},
            "dspark": {"hidden_states": aux, "target_last_hidden_states": final},
        }[algorithm]
        assert set(read) == {"input_ids", "loss_mask", *named}
        assert all(torch.equal(read[name], expected) for name, expected in named.items())
        assert (read["input_ids"].tolist(), read["loss_mask"].tolist()) == (sample.token_ids.tolist(), masks(sample))
        # A view would have brought the whole stream along.
        assert path.stat().st_size < 4 * (aux.nbytes + final.nbytes) + 8192


@pytest.mark.parametrize("last", ["pre-norm", "post-norm"])
def test_modelopt(source: Any, tmp_path: Path, last: Any) -> None:
    """A `.pt` for each sequence, which says whether its last state is before the norm."""
    assert export(source, "modelopt", tmp_path / "out", last=last)["last"] == last
    paths = sorted((tmp_path / "out").glob("*.pt"))
    for path, sample in zip(paths, sequences(source), strict=True):
        read = torch.load(path, weights_only=True)
        final = sample.hidden_states[-1] if last == "pre-norm" else sample.final_hidden_states
        assert torch.equal(read["hidden_states"], final)
        assert torch.equal(read["aux_hidden_states"], torch.cat([sample.hidden_states[at] for at in LAYERS], 1))
        assert read["hidden_states_prenorm"] is (last == "pre-norm")
        assert read["conversation_id"] == path.stem
        assert read["input_ids"].tolist() == sample.token_ids.tolist()


def test_deepspec(source: Any, tmp_path: Path) -> None:
    """Bytes at the offsets that the index states, of the types that the manifest states."""
    export(source, "deepspec", tmp_path / "out", layers=[0, -2], loss="all")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["version"], manifest["target_layer_ids"], manifest["hidden_size"]) == (2, [0, 6], 16)
    assert manifest["target_model_name_or_path"] == "made/up"
    shard = (tmp_path / "out" / manifest["shards"][0]["file_name"]).read_bytes()
    records = list(struct.iter_unpack("<QIIQQQQQ", (tmp_path / "out" / "samples.idx").read_bytes()))
    for number, (record, sample) in enumerate(zip(records, sequences(source), strict=True)):
        assert record[:3] == (number, 0, len(sample))
        tokens, mask, loss, aux, last = record[3:]
        length = len(sample)
        assert np.frombuffer(shard, np.int32, length, tokens).tolist() == sample.token_ids.tolist()
        assert shard[mask : mask + length] == shard[loss : loss + length] == b"\x01" * length
        expected = torch.cat([sample.hidden_states[layer] for layer in (0, 6)], 1)
        assert shard[aux : aux + expected.nbytes] == expected.contiguous().view(torch.uint8).numpy().tobytes()
        final = sample.final_hidden_states.contiguous().view(torch.uint8).numpy().tobytes()
        assert shard[last : last + len(final)] == final
    assert manifest["num_samples"] == len(records)


def test_deepspec_begins_further_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample goes into a new file where it does not fit, and its offsets count from there."""
    monkeypatch.setattr("vllm_tap.interchange.deepspec.Shards.__init__.__defaults__", (1500,))
    export(made(), "deepspec", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["num_shards"] == len(manifest["shards"]) > 1
    records = struct.iter_unpack("<QIIQQQQQ", (tmp_path / "out" / "samples.idx").read_bytes())
    for record, sample in zip(records, sequences(made()), strict=True):
        shard = (tmp_path / "out" / manifest["shards"][record[1]]["file_name"]).read_bytes()
        assert np.frombuffer(shard, np.int32, len(sample), record[3]).tolist() == sample.token_ids.tolist()


@pytest.mark.parametrize("packing", ["within", "across"])
def test_saelens(source: Any, tmp_path: Path, packing: str) -> None:
    """Each context is a run of rows, none twice; how many are left out is said."""
    options = {"context_size": 4, "packing": packing, "layers": [2]}
    facts = export(source, "saelens", tmp_path / "out", **options)
    read = table(tmp_path / "out")
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())["features"]["blocks.2.hook_resid_post"]
    assert (info["shape"], info["dtype"], info["_type"]) == ([4, 16], "float32", "Array2D")
    whole = [sample.hidden_states[2].float().tolist() for sample in sequences(source)]
    spans = [[row for rows in whole for row in rows]] if packing == "across" else whole
    expected = [rows[at : at + 4] for rows in spans for at in range(0, len(rows) - 3, 4)]
    found = read["blocks.2.hook_resid_post"].to_pylist()
    assert sorted(found) == sorted(expected)
    assert found != expected
    assert facts["rows_left_out"] == source.num_rows - 4 * len(expected) == source.num_rows - 4 * facts["contexts"]
    pairs = [(s.hidden_states[2].tolist(), s.token_ids.tolist()) for s in sequences(source)]
    tokens = {tuple(row): token for rows, ids in pairs for row, token in zip(rows, ids, strict=True)}
    assert read["token_ids"][0].as_py() == [tokens[tuple(row)] for row in found[0]]
    again = export(source, "saelens", tmp_path / "again", **options)
    assert again == facts
    assert table(tmp_path / "again").equals(read)
    export(source, "saelens", tmp_path / "other", seed=1, **options)
    assert not table(tmp_path / "other").equals(read)


def test_hf_and_npz(source: Any, tmp_path: Path) -> None:
    """A row and a file for each sequence, with labels."""
    export(source, "hf", tmp_path / "hf")
    export(source, "npz", tmp_path / "npz")
    rows = table(tmp_path / "hf").to_pylist()
    files = sorted((tmp_path / "npz").glob("*.npz"))
    for row, path, sample in zip(rows, files, sequences(source), strict=True):
        assert (row["sample"], row["completion"]) == (sample.index, sample.completion)
        assert (row["text"], row["prompt"]) == (f"text {sample.completion}", None)
        assert row["positions"] == sample.positions.tolist()
        assert row["hidden_states.5"] == sample.hidden_states[5].float().tolist()
        assert row["final_hidden_states"] == sample.final_hidden_states.float().tolist()
        with np.load(path) as read:
            assert read["hidden_states_layers"].tolist() == list(range(NUM_LAYERS))
            assert np.array_equal(read["hidden_states"][5], sample.hidden_states[5].float().numpy())
            assert read["token_ids"].tolist() == row["token_ids"] == sample.token_ids.tolist()
            assert read["prompt_len"] == row["prompt_len"] == len(sample.output.prompt_token_ids)


def test_ids_of_experts_keep_their_type(tmp_path: Path) -> None:
    """Of `hf` and `npz`; weights are floats."""
    capture = made(experts=True)
    export(capture, "hf", tmp_path / "hf", dtype="float16")
    features = json.loads((tmp_path / "hf" / "dataset_info.json").read_text())["features"]
    assert features["expert_ids.1"]["dtype"] == "int16"
    assert features["hidden_states.1"]["dtype"] == features["expert_weights.1"]["dtype"] == "float16"
    assert table(tmp_path / "hf").to_pylist()[0]["expert_ids.1"] == capture[0].expert_ids[1].tolist()


def test_what_is_missing_is_named_with_its_spec(tmp_path: Path) -> None:
    """A layer, the final states, positions, generated tokens; the hint has what is there already and what is not."""
    few = made(layers=(1, 3))
    with pytest.raises(LayerError, match=r"layers \[4, 7\].*Capture with Spec\(hidden_states=\[1, 3, 4, 7\]\)"):
        export(few, "speculators", tmp_path / "out")
    with pytest.raises(LayerError, match=r"Spec\(final_hidden_states=True\)"):
        export(made(final=False), "specforge", tmp_path / "out")
    with pytest.raises(PositionError, match=r'Spec\(positions="all"\)'):
        export(made(positions="generated"), "specforge", tmp_path / "out")
    with pytest.raises(RowsMissingError, match='loss="all"'):
        export(made(positions="prompt"), "modelopt", tmp_path / "out", last="pre-norm")
    with pytest.raises(RowsMissingError, match='packing="across"'):
        export(few, "saelens", tmp_path / "out", context_size=100, packing="within")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("speculator", {}, "Did you mean 'speculators'"),
        ("modelopt", {}, "needs last"),
        ("saelens", {"context_size": 4}, "needs packing"),
        ("npz", {"seed": 1}, "no option 'seed'"),
        ("modelopt", {"last": "both"}, "last is one of 'pre-norm', 'post-norm'"),
        ("speculators", {"layers": [3, 1]}, "layers ascend"),
        ("speculators", {"layers": [8]}, "layers 0 to 7"),
        ("speculators", {"loss": "metadata"}, r"metadata\['loss_mask'\] of"),
        ("saelens", {"context_size": 4, "packing": "within", "dtype": "bfloat16"}, "'float32', 'float16'"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, to: str, options: dict[str, Any], message: str) -> None:
    """Refused with what can be; nothing is written."""
    with pytest.raises(SpecError, match=message):
        export(made(), to, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_default_layers_that_do_not_fit(tmp_path: Path) -> None:
    """A model that is too shallow for EAGLE-3's layers asks for some."""
    capture = made()
    capture.num_layers = 4
    with pytest.raises(SpecError, match=r"pass layers=\[...\]"):
        export(capture, "speculators", tmp_path / "out")


def test_a_loss_mask_of_the_user(tmp_path: Path) -> None:
    """Metadata of a dataset say which tokens count."""
    capture = made()
    stated = [[position % 2 for position in range(len(sample))] for sample in capture]
    capture.save(tmp_path / "run", metadata=[{"loss_mask": mask} for mask in stated])
    export(open_dataset(tmp_path / "run"), "speculators", tmp_path / "out", loss="metadata")
    assert table(tmp_path / "out")["loss_mask"].to_pylist() == stated


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    """An empty one is taken."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(DatasetError, match="is not empty"):
        export(made(), "npz", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    export(made(), "npz", tmp_path / "empty")
    assert (tmp_path / "empty" / "vllm_tap.json").exists()


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full shows as our error."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DatasetError, match=r"No space left on device\. Nothing was exported"):
        export(made(), "npz", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
import vllm_tap.interchange.folder as folder
from made_rows import made
from vllm_tap.interchange import export
folder._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
export(made(), "npz", sys.argv[1])
"""


def test_a_killed_export_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    """Its folder is not there; the next export takes the place."""
    paths = os.pathsep.join([python_path(), *sys.path])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "out")], env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    export(made(), "npz", tmp_path / "out")


def test_the_command_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers by vllm-tap's count and the reader's; errors are a line."""
    made().save(tmp_path / "run")
    command = ["export", str(tmp_path / "run"), "--to", "speculators", "--out", str(tmp_path / "out")]
    assert main([*command, "--layers", "0,2-3"]) == 0
    assert "target layer ids  1, 3, 4" in capsys.readouterr().out
    assert main(command) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), "--to", "modelopt", "--out", str(tmp_path / "other")]) == 1
    assert "needs last" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), "--to", "npz", "--out", str(tmp_path / "other"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 6
    assert main(["export", str(tmp_path / "nothing"), "--to", "specforg", "--out", str(tmp_path / "other")]) == 1
    assert "Did you mean 'specforge'?" in capsys.readouterr().err, "before a dataset is looked for"
