"""Captures from two data parallel engines: by a server, and by an `AsyncTap`."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import device
from engine.engines import (
    ARGUMENTS,
    FULL_MATRIX,
    TOLERANCE,
    Recorded,
    References,
    compare,
    error,
    expected_rows,
    prompts,
    rows_of,
    sequence,
    surroundings,
)
from quick_start import quick_start
from runners import expert_environment
from servers import KEY, Server
from vllm_tap import AsyncTap, Capture, HttpTap, Sample, Spec
from vllm_tap.errors import PositionError

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(device.ON_CUDA, reason="two engines need two GPUs"),
]

NUM_ENGINES = 2
SPEC = Spec(hidden_states="all", embeddings=True, final_hidden_states=True)
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0}
PARALLEL: dict[str, Any] = {"data_parallel_size": NUM_ENGINES}


def compare_sample(sample: Sample, references: References) -> None:
    """Compare all rows of all positions of a sample with Hugging Face's."""
    tokens = sequence(sample.output)
    assert sample.token_ids.tolist() == tokens
    whole = references.of(tokens)
    for stream, layer in [*(("hidden_states", layer) for layer in range(4)), ("embeddings", 0)]:
        expected = expected_rows(whole, stream, layer)
        assert error(rows_of(sample, stream, layer), expected, expected.square().mean().sqrt()) < TOLERANCE


def check_rows_of_all(result: Capture) -> None:
    """Check that rows over all samples are those of each sample and completion, one behind the other."""
    slots = [(sample, completion) for sample in range(len(result)) for completion in range(2)]
    assert list(result.sequences.slots) == slots
    for layer in (0, 3):
        apart = [result.sample(*slot).hidden_states[layer] for slot in slots]
        assert torch.equal(result.rows("hidden_states", layer), torch.cat(apart))


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"] if FULL_MATRIX else ["llama"])
def family(request: pytest.FixtureRequest) -> str:
    """Family of the model: engines with experts meet in each layer, in every step."""
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path], family: str) -> Path:
    """The model."""
    return tiny_model(family)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of both engines, with two API processes."""
    with surroundings(expert_environment(NUM_ENGINES)):
        server = Server(folder, tmp_path_factory.mktemp("serve") / "log", {"max_specs": 4}, **PARALLEL)
    yield server
    server.close()


def served(server: Any) -> Counter[str]:
    """Return how many requests each engine has served to their last token."""
    text = httpx.get(server.url.replace("/v1", "/metrics")).text
    found = re.findall(r'^vllm:request_success_total\{engine="(\d+)",finished_reason="length".*\} (\S+)$', text, re.M)
    return Counter({engine: int(float(count)) for engine, count in found})


def test_all_engines_of_a_server_capture(server: Server, family: str, references: Callable[[str], References]) -> None:
    """Requests at a time are spread over them; a request may ask for one; any API process hands out the rows."""
    client = openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0)
    tap = HttpTap(server.url, api_key=KEY)

    async def ask(number: int, **options: Any) -> Any:
        return await client.completions.create(model="tiny", prompt=f"prompt {number}", **GREEDY, **options)

    async def captured(number: int, **options: Any) -> tuple[str, Sample]:
        reply = await ask(number, extra_body=tap.extra_body(SPEC), **options)
        (sample,) = await tap.samples_async(reply)
        return reply.choices[0].text, sample

    async def both(start: int, num: int, **options: Any) -> Counter[str]:
        before = served(server)
        found = await asyncio.gather(*(captured(start + number, **options) for number in range(num)))
        counts = served(server) - before
        plain = await asyncio.gather(*(ask(start + number, **options) for number in range(num)))
        for (text, sample), one in zip(found, plain, strict=True):
            assert text == one.choices[0].text
            compare_sample(sample, references(family))
        return counts

    async def run() -> None:
        counts = await both(0, 12)
        assert (sorted(counts), sum(counts.values())) == (["0", "1"], 12)
        assert min(counts.values()) >= 4
        for rank in range(NUM_ENGINES):
            assert await both(20, 2, extra_headers={"X-data-parallel-rank": str(rank)}) == {str(rank): 2}
        with pytest.raises(openai.BadRequestError, match="rank 2 captures nothing: ask for one of 0, 1"):
            await ask(30, extra_body=tap.extra_body(SPEC), extra_headers={"X-data-parallel-rank": "2"})

    asyncio.run(run())


def test_all_engines_of_an_async_llm_capture(
    folder: Path, family: str, references: Callable[[str], References], tmp_path: Path
) -> None:
    """Prompts of a stream, of a capture and of a dataset are spread over them."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(model=str(folder), **{**ARGUMENTS, **PARALLEL, "enforce_eager": True})
    given = prompts(tuple(range(5, 21)))
    ran: Counter[int] = Counter()

    async def run() -> None:
        with surroundings(expert_environment(NUM_ENGINES)), quick_start():
            llm: Any = AsyncLLM.from_engine_args(arguments)
        generate = llm.generate

        def counted(*args: Any, **options: Any) -> Any:
            ran[options["data_parallel_rank"]] += 1
            return generate(*args, **options)

        llm.generate = counted
        try:
            tap = AsyncTap(llm)
            async for sample in tap.stream(given, SPEC, most_running=8, **GREEDY, ignore_eos=True):
                compare_sample(sample, references(family))
            samples = dict(ran)
            async for block in tap.stream_rows(given, SPEC, most_running=8, **GREEDY, ignore_eos=True):
                assert block.positions.tolist() == list(range(block.positions[0], block.positions[-1] + 1))
            spread = dict(ran)
            blocks = {engine: spread[engine] - samples[engine] for engine in spread}
            for result in await asyncio.gather(*(tap.capture(given[:5], SPEC, n=2, max_tokens=6) for _ in range(2))):
                for completion in range(2):
                    compare(result, references(family), completion=completion)
                assert [sample.output.prompt_token_ids for sample in result] == [
                    prompt["prompt_token_ids"] for prompt in given[:5]
                ]
                check_rows_of_all(result)
                del result
            assert {engine: ran[engine] - spread[engine] for engine in spread} == {0: 5, 1: 5}
            before = dict(ran)
            compare(Recorded(await tap.record(given, SPEC, tmp_path, batch=6, **GREEDY)), references(family))
            assert {engine: ran[engine] - before[engine] for engine in before} == {0: 8, 1: 8}
            texts = ["a", "a prompt of more tokens than six", "b", "another one of enough tokens"]
            with pytest.raises(PositionError, match=r"prompt 0 has \d tokens and no position 6.* 2 of 4") as caught:
                await tap.capture(texts, Spec(hidden_states="all", positions=[6]), **GREEDY)
            assert caught.value.result.num_rows == 2
            for counts in (samples, blocks):
                assert sum(counts.values()) >= len(given)
                assert min(counts.values()) >= len(given) // 4
        finally:
            llm.shutdown()

    asyncio.run(run())
