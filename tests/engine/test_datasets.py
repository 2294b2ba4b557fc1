"""Datasets of a running engine, against Hugging Face and against the capture itself. In the test process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_tap
from engine.engines import (
    MAX_NEW_TOKENS,
    Engine,
    Recorded,
    References,
    Shelf,
    compare,
    compare_with_outputs,
    prompts,
    wait_until,
)
from vllm_tap import Spec
from vllm_tap.errors import DatasetError, EngineDiedError, SpecError
from vllm_tap.store.verify import verify

pytestmark = pytest.mark.engine

SPEC = Spec(hidden_states="all", router_logits="all", embeddings=True, final_hidden_states=True)
WITH_EXPERTS = Spec(hidden_states=[0, -1], router_logits=[1], routed_experts=[0, 2])
SAMPLING = {"max_tokens": MAX_NEW_TOKENS, "temperature": 0}


@pytest.fixture(scope="module")
def shelf(tiny_model: Callable[..., Path]) -> Iterator[Shelf]:
    """The engine of this module; a test that ends it leaves the next one to start another."""
    shelf = Shelf(lambda: Engine(tiny_model("qwen3_moe"), enforce_eager=True))
    yield shelf
    shelf.close()


def check(dataset: vllm_tap.Dataset, references: References) -> None:
    """Compare a dataset of `prompts()` with Hugging Face's forward passes."""
    assert [sample.prompt_token_ids for sample in dataset] == [one["prompt_token_ids"] for one in prompts()]
    assert {sample.finish_reason for sample in dataset} <= {"length", "stop"}
    compare(Recorded(dataset), references)
    compare_with_outputs(Recorded(dataset), references)
    assert verify(dataset.path).problems == []


def test_recorded_rows_are_hugging_faces(shelf, references, tmp_path):
    """Every row of every stream, in pieces of three prompts; and a process without torch reads the same numbers."""
    metadata = [{"number": number} for number in range(len(prompts()))]
    options = {"batch": 3, "metadata": metadata, **SAMPLING}
    dataset = vllm_tap.record(shelf.get().llm, prompts(), SPEC, tmp_path / "run", **options)
    check(dataset, references("qwen3_moe"))
    assert [sample.metadata for sample in dataset] == metadata
    assert set(dataset.facts.model) == {"name", "dtype", "config_sha256", "tokenizer_sha256"}
    assert dataset.routing[0].num_chosen == 2
    program = (
        "import sys, vllm_tap\n"
        f"dataset = vllm_tap.open_dataset({str(tmp_path / 'run')!r})\n"
        "print(repr(float(dataset[4].hidden_states.numpy(-1).astype('f8').sum())))\n"
        "assert not {'torch', 'vllm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(dataset[4].hidden_states[-1].double().sum().item(), rel=1e-12)


def test_workers_write_what_the_client_would(shelf, references, tmp_path):
    """Rows of pieces of three prompts, and bytes of pieces of one, of which each step is the same in each run."""
    engine, options = shelf.get(), {"batch": 1, **SAMPLING}
    pieces = vllm_tap.record(
        engine.llm, prompts(), SPEC, tmp_path / "pieces", writers="workers", **{**options, "batch": 3}
    )
    check(pieces, references("qwen3_moe"))
    recorded = {}
    for writers in ("client", "workers"):
        folder = tmp_path / writers
        dataset = vllm_tap.record(engine.llm, prompts()[2:6], SPEC, folder, writers=writers, **options)
        recorded[writers] = {one.relative_to(folder): one.read_bytes() for one in folder.glob("*/*.safetensors")}
    assert recorded["client"] == recorded["workers"]
    assert {path.name.split(".")[0] for path in recorded["workers"]} == {*dataset.layers, "labels"}
    wait_until(lambda: not engine.used_bytes(), "the end of the leases")
    with pytest.raises(SpecError, match="no socket reaches the workers"):
        vllm_tap.record(engine.llm, prompts(), SPEC, tmp_path / "x", writers="workers", transport="inline", **options)
    assert not list((tmp_path / "x").glob("*"))


def test_a_saved_capture_is_the_capture(shelf, tmp_path):
    """Bit for bit, with the completions of each prompt; into a folder that is free."""
    result = shelf.get().capture(prompts(), WITH_EXPERTS, n=2, max_tokens=4, temperature=1.0)
    result.save(tmp_path / "run", metadata=[{"a": 1}] * len(result))
    dataset = vllm_tap.open_dataset(tmp_path / "run")
    assert (dataset.layers, dataset.spec, dataset.conventions) == (result.layers, result.spec, result.conventions)
    for index in range(len(result)):
        for completion in range(2):
            mine, theirs = dataset.sample(index, completion), result.sample(index, completion)
            assert mine.token_ids.equal(theirs.token_ids)
            assert mine.positions.equal(theirs.positions)
            output = result.outputs[index].outputs[completion]
            assert mine.text == output.text
            spans = getattr(output, "weight_versions", None)
            assert mine.weight_versions == (spans and [(span.version, span.start, span.end) for span in spans])
    for stream, layers in result.layers.items():
        for layer in layers:
            mine, theirs = dataset.rows(stream, layer)[:], result.rows(stream, layer)
            assert mine.dtype == theirs.dtype  # type: ignore[attr-defined]
            assert mine.view(torch.uint8).equal(theirs.contiguous().view(torch.uint8))  # type: ignore[attr-defined]
    with pytest.raises(DatasetError, match="holds a dataset already"):
        result.save(tmp_path / "run")


def test_recording_goes_on_with_another_engine(shelf, references, tmp_path):
    """One that is killed on the way loses what was not sealed; the same call with the next one captures the rest.

    Workers write the first parts, the client the others.
    """
    engine = shelf.get()
    pid = engine.status()[0]["pid"]
    options = {"batch": 2, **SAMPLING}

    def kill(part: Any) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(EngineDiedError):
        vllm_tap.record(engine.llm, prompts(), SPEC, tmp_path / "run", on_part=kill, writers="workers", **options)
    held = len(vllm_tap.open_dataset(tmp_path / "run"))
    assert 0 < held < len(prompts())
    shelf.close()
    seen = []
    llm = shelf.get().llm
    dataset = vllm_tap.record(llm, prompts(), SPEC, tmp_path / "run", resume=True, on_part=seen.append, **options)
    assert sum(part.num_samples for part in seen) == len(prompts()) - held
    check(dataset, references("qwen3_moe"))
    with pytest.raises(DatasetError, match="sampling is"):
        vllm_tap.record(llm, prompts(), SPEC, tmp_path / "run", resume=True, **{**options, "max_tokens": 3})
