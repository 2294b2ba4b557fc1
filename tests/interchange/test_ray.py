"""Ray Data's vLLM processor, unmodified, with rows recorded by its actors. Skips where Ray is not installed.

`make test-interchange-ray`. Ray is told to plan for a host without a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import device
from engine.engines import TOLERANCE, References, error
from readers import reader
from vllm_tap import Spec, open_dataset
from vllm_tap.errors import DatasetError, SpecError
from vllm_tap.interchange.ray_data import STAGE, recorded
from vllm_tap.store.dataset import Dataset
from vllm_tap.store.verify import verify

pytestmark = pytest.mark.skipif(device.ON_CUDA, reason="Ray is told that this host has no GPU")

SPEC = Spec(hidden_states=[0, -1], final_hidden_states=True)
NUM_ROWS, LONGEST = 60, 256
TOO_LONG = (7, 31)
"""Rows whose prompts vLLM refuses."""


class Run(NamedTuple):
    """A run of a processor: what Ray returned, and what was recorded."""

    rows: list[dict[str, Any]]
    dataset: Dataset
    path: Path
    model: Path


@pytest.fixture(scope="module")
def build(tiny_model: Callable[..., Path]) -> Iterator[Callable[..., Any]]:
    """A function that builds a processor."""
    llm = reader("ray.data.llm")
    ray = reader("ray")
    ray.init(num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)

    def make(**config: Any) -> Any:
        engine = {"enforce_eager": True, "dtype": "float32", "max_model_len": LONGEST, "max_num_seqs": 16}
        stages = dict.fromkeys(("chat_template_stage", "tokenize_stage", "detokenize_stage"), False)
        given = llm.vLLMEngineProcessorConfig(
            model_source=str(tiny_model("llama")),
            engine_kwargs=engine,
            placement_group_config={"bundles": [{"CPU": 1}]},
            batch_size=16,
            should_continue_on_error=True,
            log_engine_metrics=False,
            **{**stages, **config},
        )
        sampling = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True}
        return llm.build_processor(
            given,
            preprocess=lambda row: {
                "prompt": f"Number {row['id']}" + "." * (LONGEST if row["id"] in TOO_LONG else row["id"] % 20),
                "sampling_params": sampling,
            },
            postprocess=lambda row: {name: row[name] for name in ("id", "sample", "generated_tokens")},
        )

    yield make
    ray.shutdown()


@pytest.fixture(scope="module")
def run(build: Callable[..., Any], tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Prompts of which some fail."""
    path = tmp_path_factory.mktemp("ray") / "run"
    processor = recorded(build(), SPEC, path, metadata=["id"])
    rows = processor(reader("ray").data.range(NUM_ROWS)).take_all()
    return Run(rows, open_dataset(path), path, tiny_model("llama"))


def test_each_row_of_ray_names_its_sample(run):
    """A number of its own for each that did not fail, whose metadata and tokens are the row's."""
    done = [row for row in run.rows if row["sample"] is not None]
    assert sorted(row["id"] for row in done) == [number for number in range(NUM_ROWS) if number not in TOO_LONG]
    table = {row["sample"]: row for row in run.dataset.table().to_pylist()}
    assert sorted(table) == sorted(int(row["sample"]) for row in done)
    for row in done:
        sample = table[row["sample"]]
        assert json.loads(sample["metadata"]) == {"id": row["id"]}
        assert sample["generated_token_ids"] == list(row["generated_tokens"])
    assert sum("maximum" in (row["__inference_error__"] or "") for row in run.rows) == len(TOO_LONG)


def test_recorded_rows_are_those_of_hugging_face(run):
    """All positions of some sequences in all streams and layers; every byte has the checksum that was sealed."""
    assert not verify(run.path).problems
    references = References(run.model)
    for sample in list(run.dataset.sequences())[::9]:
        tokens = [*sample.prompt_token_ids, *sample.generated_token_ids][:-1]
        assert sample.token_ids.tolist() == tokens
        expected = references.of(tokens)
        for layer in run.dataset.layers["hidden_states"]:
            whole = expected.hidden_states[layer]
            assert error(sample.hidden_states[layer], whole, whole.square().mean().sqrt()) < TOLERANCE
        assert error(sample.final_hidden_states, expected.final_normed, 1.0) < TOLERANCE


def test_more_rows_go_behind_those_that_are_there(run, build):
    """Only if that was asked for, and of the same Spec."""
    with pytest.raises(DatasetError, match="append=True"):
        recorded(build(), SPEC, run.path)
    with pytest.raises(DatasetError, match="holds rows of"):
        recorded(build(), Spec(hidden_states=[0]), run.path, append=True)
    processor = recorded(build(), SPEC, run.path, append=True)
    options = processor.stages[STAGE].fn_constructor_kwargs["recording"]
    last = run.dataset.parts[-1].manifest
    assert reader("ray").get(options.numbers.take.remote(1)) == last.first_sample + last.num_samples


def test_a_processor_that_cannot_be_recorded_is_refused(build, tmp_path):
    """Something else, one that embeds, one that records already."""
    with pytest.raises(SpecError, match="build_processor"):
        recorded(object(), SPEC, tmp_path)
    with pytest.raises(SpecError, match="'embed'"):
        recorded(build(task_type="embed"), SPEC, tmp_path)
    with pytest.raises(SpecError, match="records already"):
        recorded(recorded(build(), SPEC, tmp_path), SPEC, tmp_path)
