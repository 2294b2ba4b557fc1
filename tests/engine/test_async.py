"""Captures from an `AsyncLLM`: rows at the end, samples and rows as they come, beside requests that nobody captures.

Runs in the test process, beside one eager Llama engine, in one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import runpy
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import device
import vllm_tap
from engine.engines import (
    ARGUMENTS,
    TOLERANCE,
    Recorded,
    References,
    compare,
    error,
    expected_rows,
    greedy,
    prompts,
    rows_of,
    sequence,
)
from quick_start import quick_start
from vllm_tap import AsyncTap, Positions, Spec, Spill
from vllm_tap.errors import BudgetError, DatasetError, LayerError, PositionError, SpecError
from vllm_tap.store.verify import verify

pytestmark = pytest.mark.engine

EVERYTHING = Spec(hidden_states="all", embeddings=True, final_hidden_states=True)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ voice | default('assistant') }}: {% endif %}"
)
CHATS = [
    [{"role": "user", "content": "bees?"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "And the sea?"}],
]
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}


class Running:
    """An engine and the event loop that runs it."""

    def __init__(self, folder: Path) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._runner = asyncio.Runner()
        arguments = device.engine_arguments(**{**ARGUMENTS, "enforce_eager": True})
        start = AsyncLLM.from_engine_args

        async def started() -> Any:
            with quick_start():
                return start(AsyncEngineArgs(model=str(folder), **arguments))

        self.llm: Any = self.run(started())

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine to its end."""
        return self._runner.run(coroutine)

    async def plain(self, given: Any, name: str, **fields: Any) -> list[int]:
        """Return the tokens of a request that nobody captures."""
        outputs = [output async for output in self.llm.generate(given, greedy(**fields), name)]
        return list(outputs[-1].outputs[0].token_ids)

    async def is_free(self) -> bool:
        """Tell whether nothing is left in the engine."""
        states = await self.llm.collective_rpc("vllm_tap_status")
        return not self.llm.output_processor.request_states and not any(state["used_bytes"] for state in states)

    async def capacity(self) -> int:
        """Return the bytes of all memory for rows, also of clients that have none now."""
        return sum(state["capacity_bytes"] for state in await self.llm.collective_rpc("vllm_tap_status"))

    def close(self) -> None:
        """End the engine."""
        self.llm.shutdown()
        self._runner.close()


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Iterator[Running]:
    """An engine that generates."""
    engine = Running(tiny_model("llama"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tap(engine: Running) -> AsyncTap:
    """Its tap."""
    return AsyncTap(engine.llm)


async def until_free(engine: Running) -> None:
    """Wait until nothing is left in the engine."""
    async with asyncio.timeout(20):
        while not await engine.is_free():
            await asyncio.sleep(0)


def test_captures_beside_plain_requests_are_those_of_hugging_face(
    engine: Running, tap: AsyncTap, references: Callable[[str], References]
) -> None:
    """Two captures at a time; plain requests get the tokens that they get alone."""
    others = prompts((7, 40), seed=3)

    async def run() -> None:
        alone = [await engine.plain(one, f"alone-{i}") for i, one in enumerate(others)]
        first, second, *beside = await asyncio.gather(
            tap.capture(prompts(), EVERYTHING, **GREEDY),
            tap.capture(prompts((5, 90)), Spec(hidden_states=[1], positions="generated"), **GREEDY),
            *(engine.plain(one, f"beside-{i}") for i, one in enumerate(others)),
        )
        assert beside == alone
        compare(first, references("llama"))
        compare(second, references("llama"), lambda prompt, rows: list(range(prompt, rows)))
        del first, second
        await until_free(engine)

    engine.run(run())


def test_a_dataset_is_recorded_beside_plain_requests(
    engine: Running, tap: AsyncTap, references: Callable[[str], References], tmp_path: Path
) -> None:
    """Cancelled behind its first part it leaves that and no memory, and the same call goes on behind it."""
    given, other = prompts(tuple(range(4, 15))), prompts((40,), seed=3)[0]
    arguments: Any = (given, EVERYTHING, tmp_path)
    options: dict[str, Any] = {"batch": 4, "metadata": [{"number": number} for number in range(11)], **GREEDY}

    async def run() -> None:
        alone, loop, sealed = await engine.plain(other, "alone"), asyncio.get_running_loop(), asyncio.Event()
        recording = asyncio.create_task(
            tap.record(*arguments, **options, on_part=lambda part: loop.call_soon_threadsafe(sealed.set))
        )
        await sealed.wait()
        recording.cancel()
        with pytest.raises(asyncio.CancelledError):
            await recording
        assert not engine.llm.output_processor.request_states
        await until_free(engine)
        left = len(vllm_tap.open_dataset(tmp_path))
        assert left in (4, 8)
        with pytest.raises(DatasetError, match="pass resume=True"):
            await tap.record(*arguments, **options)
        parts: list[int] = []
        dataset, beside = await asyncio.gather(
            tap.record(*arguments, **options, resume=True, on_part=lambda part: parts.append(part.first_sample)),
            engine.plain(other, "beside"),
        )
        assert beside == alone
        assert parts == list(range(left, 11, 4))
        assert [sample.metadata for sample in dataset] == options["metadata"]
        compare(Recorded(dataset), references("llama"))
        assert verify(dataset.path).problems == []
        await until_free(engine)

    engine.run(run())
    with pytest.raises(SpecError, match=r"one vllm_tap\.Spec for all prompts, got a list"):
        engine.run(tap.record(given, [EVERYTHING] * 11, tmp_path / "other"))  # type: ignore[arg-type]


def test_the_example_runs(engine: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """examples/async_llm.py: rows of two captures, of a dataset, and of the best of all tries."""
    main = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "async_llm.py"))["main"]
    engine.run(main(engine.llm, tmp_path))
    whole, dataset, *_ = capsys.readouterr().out.splitlines()
    prompts, tries = (vllm_tap.open_dataset(tmp_path / name) for name in ("prompts", "tries"))
    num_rows, width = prompts.num_rows, prompts.facts.streams[0].width
    assert whole == f"torch.Size([{num_rows}, {width}]) torch.Size([2, {width}])"
    assert dataset == f"4 ({num_rows}, {width})"
    assert [len(sample) for sample in tries] == [15] * 16
    assert sorted(sample.metadata["prompt"] for sample in tries) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_samples_come_as_they_end(engine: Running, tap: AsyncTap, references: Callable[[str], References]) -> None:
    """With `n` of 2, each completion once, with its rows."""

    async def run() -> None:
        seen = []
        async for sample in tap.stream(iter(prompts()), EVERYTHING, **{**GREEDY, "temperature": 1.0, "n": 2}):
            seen.append((sample.index, sample.completion))
            number = [one.index for one in sample.output.outputs].index(sample.completion)
            tokens = sequence(sample.output, number)
            assert sample.token_ids.tolist() == tokens
            expected = expected_rows(references("llama").of(tokens), "hidden_states", 3)
            assert error(rows_of(sample, "hidden_states", 3), expected, expected.square().mean().sqrt()) < TOLERANCE
        assert sorted(seen) == [(i, c) for i in range(len(prompts())) for c in (0, 1)]
        await until_free(engine)

    engine.run(run())


EXPRESSIONS = Positions.prompt(-3) | Positions.generated(step=2), Positions.generated(-3)


@pytest.mark.parametrize("positions", ["all", "generated", "last", "last_generated", [0, -1], *EXPRESSIONS], ids=str)
@pytest.mark.parametrize("reduce", [None, "mean"])
def test_rows_of_a_running_sequence_are_those_of_a_capture(
    engine: Running, tap: AsyncTap, positions: Any, reduce: str | None
) -> None:
    """Put together; each row that is known comes before eight more tokens are generated."""
    spec = Spec(hidden_states="all", positions=positions, reduce=reduce)
    comes_late = positions in ("last", [0, -1]) or spec.needs_end or reduce

    async def run() -> None:
        whole = await tap.capture(prompts((5, 33, 9)), spec, **GREEDY)
        found: dict[int, list[Any]] = {}
        async for block in tap.stream_rows(prompts((5, 33, 9)), spec, **GREEDY):
            found.setdefault(block.index, []).append(block)
            late = len(block.output.prompt_token_ids) + len(block.output.outputs[0].token_ids) - 1
            assert not len(block) or comes_late or late - int(block.positions[-1]) < 8
        for index, sample in enumerate(whole):
            assert [block.finished for block in found[index]] == [False] * (len(found[index]) - 1) + [True]
            assert torch.cat([b.positions for b in found[index]]).tolist() == sample.positions.tolist()
            for layer in range(4):
                rows = torch.cat([block.hidden_states[layer] for block in found[index]])
                expected = sample.hidden_states[layer].clone()  # a view would hold the memory
                assert error(rows, expected, expected.square().mean().sqrt()) < TOLERANCE
        fewest = 1 if device.ON_CUDA else 3  # a GPU makes eight tokens of a tiny model in a few milliseconds
        assert positions != "all" or reduce or all(len(blocks) > fewest for blocks in found.values())
        del whole, sample
        await until_free(engine)

    engine.run(run())


def test_a_reader_of_rows_that_is_slow_changes_no_tokens_of_others(engine: Running, tap: AsyncTap) -> None:
    """Nor its own rows: those that came while it did not read are there when it reads on."""
    others, spec = prompts((30, 7), seed=4), Spec(hidden_states="all")

    async def run() -> None:
        alone = [await engine.plain(one, f"alone-{n}", max_tokens=40) for n, one in enumerate(others)]
        whole = await tap.capture(prompts((5, 33, 9)), spec, **GREEDY)
        found: dict[int, list[Any]] = {}
        async with contextlib.aclosing(tap.stream_rows(prompts((5, 33, 9)), spec, **GREEDY)) as blocks:
            async for block in blocks:
                if not found:
                    running = (engine.plain(one, f"beside-{n}", max_tokens=40) for n, one in enumerate(others))
                    assert await asyncio.gather(*running) == alone
                found.setdefault(block.index, []).append(block)
        for index, sample in enumerate(whole):
            assert torch.cat([block.positions for block in found[index]]).equal(sample.positions)
            rows, expected = torch.cat([block.hidden_states[3] for block in found[index]]), sample.hidden_states[3]
            assert error(rows, expected, expected.square().mean().sqrt()) < TOLERANCE
        del whole, sample, expected
        await until_free(engine)

    engine.run(run())


def test_what_is_cancelled_or_left_gives_its_memory_back(engine: Running, tap: AsyncTap) -> None:
    """Also beside a stream of the same Spec that goes on, which loses nothing."""
    long = {**GREEDY, "max_tokens": 100}

    async def first_block(name: int) -> None:
        async with contextlib.aclosing(tap.stream_rows(prompts((20,), seed=name), EVERYTHING, **long)) as blocks:
            async for _ in blocks:
                return

    async def whole() -> None:
        blocks = [block async for block in tap.stream_rows(prompts((9,)), EVERYTHING, **long)]
        assert torch.cat([block.positions for block in blocks]).tolist() == list(range(108))

    async def run() -> None:
        stays = asyncio.create_task(whole())
        capturing = asyncio.create_task(tap.capture(prompts((5, 9)), EVERYTHING, **long))
        streaming = asyncio.create_task(anext(tap.stream(prompts((5, 9)), Spec(hidden_states=[0]), **long)))
        await asyncio.gather(*(first_block(name) for name in range(4)))
        for task in (capturing, streaming):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await stays
        await until_free(engine)

    engine.run(run())


BUDGET = 1 << 20


@pytest.mark.parametrize("on_full", ["wait", "spill"])
def test_a_stalled_reader_keeps_its_prompts_back_and_no_others(
    engine: Running, references: Callable[[str], References], tmp_path: Path, on_full: str
) -> None:
    """The engine stays within the budget, others get their tokens, and the reader gets every row when it reads on."""
    given = Spill(tmp_path, 64 << 20) if on_full == "spill" else on_full
    bounded = AsyncTap(engine.llm, budget_bytes=BUDGET, on_full=given)

    async def run() -> None:
        alone = await engine.plain(prompts((30,), seed=4)[0], "alone")
        spec, others = Spec(hidden_states="all"), await engine.capacity()
        async with contextlib.aclosing(bounded.stream(prompts((100,) * 100), spec, **GREEDY)) as samples:
            seen = [await anext(samples)]
            for number in range(10):  # all that runs meanwhile
                assert await engine.plain(prompts((30,), seed=4)[0], f"beside-{number}") == alone
                assert await engine.capacity() - others <= BUDGET
            async for sample in samples:
                seen.append(sample)
                expected = references("llama").of(sequence(sample.output)).hidden_states[3]
                assert error(sample.hidden_states[3], expected, expected.square().mean().sqrt()) < TOLERANCE
        assert sorted(sample.index for sample in seen) == list(range(100))
        await until_free(engine)

    engine.run(run())


def test_a_stalled_reader_that_may_not_wait_fails(engine: Running) -> None:
    """Nobody else is the worse for it."""
    failing = AsyncTap(engine.llm, budget_bytes=BUDGET, on_full="fail")

    async def read() -> None:
        spec = Spec(hidden_states="all")
        async for sample in failing.stream(prompts((200,) * 60), spec, **{**GREEDY, "max_tokens": 40}):
            await engine.plain(prompts((30,))[0], f"beside-{sample.index}")

    async def run() -> None:
        with pytest.raises(BudgetError, match=f"of budget_bytes={BUDGET} are in use") as caught:
            await read()
        await until_free(engine)  # also while somebody holds the error
        assert caught.value.budget_bytes == BUDGET

    engine.run(run())


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"voice": "bee"}}])
def test_conversations_go_through_a_chat_template(
    engine: Running, tap: AsyncTap, references: Callable[[str], References], options: dict[str, Any]
) -> None:
    """Prompts are those of transformers, in all three ways; they stand beside other prompts in a stream."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(engine.llm.vllm_config.model_config.tokenizer)
    for_template = {"add_generation_prompt": True, **options, **options.get("chat_template_kwargs", {})}
    expected = [
        tokenizer.apply_chat_template(
            chat, chat_template=TEMPLATE, tokenize=True, return_dict=False, **for_template
        ) for chat in CHATS
    ]  # fmt: skip
    given: dict[str, Any] = {"spec": EVERYTHING, "chat_template": TEMPLATE, **options, **GREEDY}

    async def run() -> None:
        result = await tap.capture(CHATS, **given)
        assert [output.prompt_token_ids for output in result.outputs] == expected
        compare(result, references("llama"))
        found = {sample.index: sample.output.prompt_token_ids async for sample in tap.stream(CHATS, **given)}
        assert [found[number] for number in range(len(CHATS))] == expected
        first = [block.output.prompt_token_ids async for block in tap.stream_rows(CHATS[0], **given)]
        assert first[0] == expected[0]
        del result

    engine.run(run())


def test_a_capture_that_cannot_be_leaves_the_others_alone(engine: Running, tap: AsyncTap) -> None:
    """Each failure says what it says of an offline engine."""

    async def refused(kind: type[Exception], match: str, **arguments: Any) -> None:
        given: dict[str, Any] = {"prompts": prompts(), "spec": EVERYTHING, **GREEDY, **arguments}
        with pytest.raises(kind, match=match):
            await tap.capture(**given)
        with pytest.raises(kind, match=match):
            async for _ in tap.stream(**given):
                pass

    async def run() -> None:
        small = AsyncTap(engine.llm, budget_bytes=1 << 16)
        with pytest.raises(BudgetError):
            await small.capture(prompts(), EVERYTHING, **GREEDY)
        await refused(LayerError, "no layer 9", spec=Spec(hidden_states=[9]))
        await refused(PositionError, "no position 50", spec=Spec(hidden_states=[0], positions=[50]))
        await refused(SpecError, "has no field 'maxtokens'", maxtokens=3)
        hello = [5, 9]
        # The one refuses two kinds in a call; the other reads prompt by prompt, and this model has no chat template.
        await refused(SpecError, "prompt 1 is a conv|vLLM refuses prompt 1.*template", prompts=[hello, CHATS[0]])
        await refused(SpecError, "tools: for conversations alone, and prompt 0 is none", prompts=[hello], tools=[])
        await refused(SpecError, r"vLLM refuses prompt 1, .*\b300\b", prompts=[hello, [5] * 300])
        await refused(SpecError, r"vLLM refuses prompt 1, .*256", prompts=["bees", "the sea " * 100])
        typed = {"input_ids": hello, "token_type_ids": [0, 1]}
        await refused(SpecError, "^prompt 1 has token_type_ids", prompts=[hello, typed])
        short = Spec(hidden_states=[0], positions=[4])
        await refused(PositionError, "prompt 1 has 2 tokens", prompts=[[5] * 5, hello], spec=short)
        await refused(PositionError, "prompt 1 has . tokens?", prompts=["bees and the sea", "a"], spec=short)
        with pytest.raises(SpecError, match="one sequence is generated for each prompt"):
            await anext(tap.stream_rows(prompts(), EVERYTHING, n=2))
        with pytest.raises(SpecError, match="expected a vLLM AsyncLLM"):
            AsyncTap("model")
        await until_free(engine)
        assert len((await tap.capture(prompts((5,)), EVERYTHING, **GREEDY))[0]) == 12

    engine.run(run())


@pytest.mark.parametrize("has_default", [False, True])
def test_a_server_that_forbids_captures_takes_none(engine: Running, tap: AsyncTap, has_default: bool) -> None:
    """It refuses requests that ask for one, and leaves the others alone, whatever its default is."""
    from fastapi import HTTPException
    from prometheus_client import CollectorRegistry

    from vllm_tap.client.engines import Engines
    from vllm_tap.labels import KEY
    from vllm_tap.serve.captures import Captures
    from vllm_tap.serve.metrics import Metrics
    from vllm_tap.serve.results import Results
    from vllm_tap.serve.settings import Settings

    llm = SimpleNamespace(generate=engine.llm.generate, engine_core=None)
    given = Settings(captures="forbid", spec={"hidden_states": [1]} if has_default else None)
    metrics = Metrics(CollectorRegistry())
    Captures(llm, Engines(llm, {0: SimpleNamespace()}), Results(given), given, metrics)
    prompt = {"prompt_token_ids": [1, 2, 3]}

    async def run() -> None:
        alone = await engine.plain(prompt, "as-ever")
        outputs = [output async for output in llm.generate(prompt, greedy(), "plain")]
        assert (list(outputs[-1].outputs[0].token_ids), outputs[-1].kv_transfer_params) == (alone, None)
        with pytest.raises(HTTPException, match="takes no captures") as refused:
            llm.generate(prompt, greedy(extra_args={KEY: EVERYTHING.to_json()}), "captured")
        assert refused.value.status_code == 403
        assert metrics.refusals._value.get() == 1

    engine.run(run())
