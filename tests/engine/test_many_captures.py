"""Captures of several clients in one engine at the same time; runs in the test process and others beside one engine.

Another client is a process that has the addresses of the engine's sockets and no engine object.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.engines import (
    MAX_NEW_TOKENS,
    TOLERANCE,
    Engine,
    References,
    compare,
    error,
    expected_rows,
    greedy,
    prompts,
    wait_until,
)
from engine.test_specs_per_prompt import wanted
from vllm_tap import Positions, Recording, Spec
from vllm_tap.client.connection import connect
from vllm_tap.errors import BudgetError, TransportError
from vllm_tap.labels import mark
from vllm_tap.vllm import stepping

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    """Llama, eager; the 30 blocks of its cache hold 960 tokens, fewer than sixteen requests may need."""
    engine = Engine(
        tiny_model("llama"),
        enforce_eager=True,
        enable_prefix_caching=True,
        max_model_len=640,
        block_size=32,
        num_gpu_blocks_override=30,
        disable_log_stats=False,
    )
    yield engine
    engine.close()


@pytest.fixture
def known(references: Callable[[str], References]) -> References:
    """Hugging Face's forward passes of the engine's model."""
    return references("llama")


def run(engine: Engine, params: list[Any], seed: int) -> list[Any]:
    """Generate with these parameters, one for each prompt."""
    given = prompts(range(3, 3 + 4 * len(params), 4), seed)
    return list(engine.llm.generate(given, params, use_tqdm=False))


def test_captures_overlap_and_each_has_its_own_rows(engine, known):
    """They begin and end beside one another, with requests in the same steps as those of others and of nobody."""
    first = Recording(engine.llm, Spec(hidden_states=[0, 2]))
    early = run(engine, [first.mark(greedy(), 0), greedy()], seed=1)
    second = Recording(engine.llm, Spec(hidden_states=[1], final_hidden_states=True, positions="generated"))
    assert len(engine.status()[0]["captures"]) == 2
    both = run(engine, [second.mark(greedy(), 0), first.mark(greedy(), 1), greedy(), first.mark(greedy(), 2)], seed=2)
    rows_before = first.counts()[0]
    late = run(engine, [second.mark(greedy(), 1)], seed=3)
    assert first.counts()[0] == rows_before
    compare(first.finish([early[0], both[1], both[3]]), known)
    last = run(engine, [greedy(), second.mark(greedy(), 2)], seed=4)
    result = second.finish([both[0], late[0], last[1]])
    compare(result, known, lambda prompt_len, num_rows: list(range(prompt_len, num_rows)))
    assert [state["captures"] for state in engine.status()] == [[]]


def test_a_capture_beyond_its_budget_ends_alone(engine, known):
    """The other one of the same client has a budget of its own, and its rows; requests of both go on."""
    rich = Recording(engine.llm, Spec(hidden_states="all"))
    poor = Recording(engine.llm, Spec(hidden_states="all"), budget_bytes=8192)
    outputs = run(engine, [rich.mark(greedy(), 0), poor.mark(greedy(), 0), rich.mark(greedy(), 1)], seed=5)
    assert all(len(output.outputs[0].token_ids) == MAX_NEW_TOKENS for output in outputs)
    with pytest.raises(BudgetError, match="of budget_bytes=8192 are in use"):
        poor.finish([outputs[1]])
    compare(rich.finish([outputs[0], outputs[2]]), known)


def test_worker_calls_go_beside_a_capture(engine, known):
    """The calls of the former interface take the rows of all requests, those of the capture as well."""
    llm, layer = engine.llm, 1
    recording = Recording(llm, Spec(hidden_states=[layer]))
    llm.collective_rpc("enable_hidden_states_capture")
    given = prompts([7, 12], seed=6)
    outputs = llm.generate(given, [recording.mark(greedy(), 0), greedy()], use_tqdm=False)
    llm.collective_rpc("disable_hidden_states_capture")
    result = recording.finish(outputs[:1])
    compare(result, known)
    (payload,) = llm.collective_rpc("get_captured_hidden_states")
    rows = torch.frombuffer(bytearray(payload[layer]["data"]), dtype=torch.float32).view(payload[layer]["shape"])
    assert torch.equal(rows[: result.num_rows], result[0].hidden_states[layer])
    # Worker calls do not know the end: a step beyond it may have left a row.
    assert len(rows) >= sum(len(output.prompt_token_ids) + MAX_NEW_TOKENS - 1 for output in outputs)
    llm.collective_rpc("clear_hidden_states")


SPECS = [
    Spec(hidden_states="all"),
    Spec(hidden_states=[0, 2], positions="generated"),
    Spec(hidden_states=[1], positions="last"),
    Spec(embeddings=True, final_hidden_states=True, positions=Positions.prompt(-8)),
    Spec(hidden_states=[3], positions=Positions.prompt(-3) | Positions.generated(step=4)),
    Spec(hidden_states=[-1], positions=[0, -1]),
    Spec(hidden_states=[2], reduce="mean"),
    Spec(hidden_states=[1, 3], positions="prompt"),
    Spec(embeddings=True),
    Spec(final_hidden_states=True, positions="last_generated"),
    Spec(hidden_states=[0], positions=Positions.generated(-3)),
    Spec(hidden_states="all", positions=Positions.prompt(5, None, 7)),
]
NUM_REQUESTS = 64
NUM_CLIENTS = 3
NEW_TOKENS = (2, 12, 30, 45)
MAY_BE_ALIKE = 3
"""Rows of positions before may be those of another prompt that begins with the same tokens."""

MIXED_CLIENT = """
import pickle, sys
from pathlib import Path
from vllm import SamplingParams
from vllm_tap import Recording
from vllm_tap.client.connection import Connection

folder = Path(sys.argv[1])
specs, fields = pickle.loads((folder / "asked").read_bytes())
connection = Connection.at(sys.argv[2:])
recording = Recording(connection, specs)
marked = [recording.mark(SamplingParams(**each), number) for number, each in enumerate(fields)]
(folder / "marked").write_bytes(pickle.dumps(marked))
print("capture", recording.capture_id, flush=True)
sys.stdin.readline()
outputs = pickle.loads((folder / "outputs").read_bytes())
result = recording.finish(outputs)
memory = [b""]
for reader in connection.readers().values():
    for number in range(1, 40):
        try:
            memory.append(reader.segment_array(number).tobytes())
        except Exception:
            continue
foreign = pickle.loads((folder / "foreign").read_bytes())
found = [row for part in memory for row in rows_in(part, foreign)]
samples = [result[number] for number, output in enumerate(outputs) if output is not None]
(folder / "rows").write_bytes(pickle.dumps((samples, len(memory), len(found))))
print("done", flush=True)
sys.stdin.readline()
"""

CLIENT = """
import pickle, sys
from pathlib import Path
from vllm_tap import Recording, Spec
from vllm_tap.client.connection import Connection

folder = Path(sys.argv[1])
connection = Connection.at(sys.argv[2:])
recording = Recording(connection, Spec(hidden_states=[1]))
print("capture", recording.capture_id, flush=True)
sys.stdin.readline()
recording.note_marked(range(2))
result = recording.finish(pickle.loads((folder / "outputs").read_bytes()))
rows = [sample.hidden_states[1].clone() for sample in result]
foreign = (folder / "foreign").read_bytes()
found = []
for reader in connection.readers().values():
    # Whatever the worker hands out when it is asked for it.
    for number in range(1, 20):
        try:
            memory = reader.segment_array(number).tobytes()
        except Exception:
            continue
        found.append(rows[0][0].numpy().tobytes() in memory)
        width = rows[0].shape[1] * 4
        rows_of_others = [foreign[at : at + width] for at in range(0, len(foreign), width)]
        assert not any(row in memory for row in rows_of_others), "rows of another client"
assert any(found), "its own rows are there"
(folder / "rows").write_bytes(pickle.dumps(rows))
print("done", flush=True)
sys.stdin.readline()
"""


def rows_in(memory: bytes, rows: list[bytes]) -> list[bytes]:
    """Return those of some rows that lie in memory, at any byte: their first words are looked for among all of it."""
    import numpy as np

    if len(memory) < 16 or not rows:
        return []
    firsts = np.array([int.from_bytes(row[:8], "little") for row in rows], "<u8")
    ascending, near = np.sort(firsts), []
    for offset in range(8):
        words = np.frombuffer(memory, "<u8", (len(memory) - offset) // 8, offset)
        words = words[words != 0]
        closest = ascending[np.searchsorted(ascending, words).clip(max=len(rows) - 1)]
        near.append(words[closest == words])
    return [rows[number] for number in np.flatnonzero(np.isin(firsts, np.concatenate(near))) if rows[number] in memory]


class Client:
    """A process that captures layer 1 from an engine that it reaches by its sockets alone."""

    def __init__(self, folder: Path, addresses: list[str], program: str = CLIENT) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(folder), *addresses],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.capture_id = self.said("capture")

    def said(self, word: str) -> str:
        """Wait for a line that begins with a word; return the rest of it."""
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if line.startswith(word)), None)
        assert line is not None, f"the client ended with status {self.process.wait()}"
        return line.removeprefix(word).strip()

    def mark(self, sample: int) -> Any:
        """Return parameters that make the engine capture a request for this client."""
        return greedy(extra_args=mark(self.capture_id, sample, 1), skip_reading_prefix_cache=True)

    def go_on(self) -> None:
        """Let the client do what comes next."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@pytest.fixture
def clients(engine: Engine, tmp_path: Path) -> Iterator[list[Client]]:
    """Two more clients."""
    addresses = connect(engine.llm).addresses
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        found.append(Client(tmp_path / name, addresses))
    yield found
    for client in found:
        client.process.kill()
        client.process.wait()


def test_other_processes_capture_at_the_same_time_and_map_nothing_of_each_other(engine, known, clients):
    """Requests of three clients in the same steps; each finds its own rows, and in no memory those of the others."""
    own = Recording(engine.llm, Spec(hidden_states=[1]))
    params = [each for n in range(2) for each in (own.mark(greedy(), n), clients[0].mark(n), clients[1].mark(n))]
    outputs = run(engine, params, seed=7)
    mine = own.finish(outputs[::3])
    compare(mine, known)
    rows = {0: [sample.hidden_states[1] for sample in mine]}
    rows |= {n: [known.of(tokens(output)).hidden_states[1] for output in outputs[n::3]] for n in (1, 2)}
    for number, client in enumerate(clients, 1):
        (client.folder / "outputs").write_bytes(pickle.dumps(outputs[number::3]))
        (client.folder / "foreign").write_bytes(b"".join(part.numpy().tobytes() for part in rows[0]))
        client.go_on()
        client.said("done")
        for found, right in zip(pickle.loads((client.folder / "rows").read_bytes()), rows[number], strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=1e-5 * float(right.square().mean().sqrt()))
    assert [state["captures"] for state in engine.status()] == [[]]


def tokens(output: Any) -> list[int]:
    """Return the tokens that went through the model."""
    return [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]


def test_a_client_that_is_killed_takes_its_capture_along_and_no_other(engine, known, clients):
    """Its memory is free, its requests go on, and the others have their rows."""
    own = Recording(engine.llm, Spec(hidden_states="all"))
    outputs = run(engine, [clients[0].mark(0), own.mark(greedy(), 0), clients[1].mark(0)], seed=8)
    assert len(engine.status()[0]["captures"]) == 3
    used = engine.used_bytes()
    os.kill(clients[0].process.pid, 9)
    wait_until(lambda: len(engine.status()[0]["captures"]) == 2, "the end of the capture")
    assert engine.used_bytes() < used
    more = run(engine, [own.mark(greedy(), 1), clients[0].mark(1), clients[1].mark(1)], seed=9)
    compare(own.finish([outputs[1], more[0]]), known)
    (clients[1].folder / "outputs").write_bytes(pickle.dumps([outputs[2], more[2]]))
    (clients[1].folder / "foreign").write_bytes(b"")
    clients[1].go_on()
    clients[1].said("done")


def rows_at(sample: Any, first: int) -> list[bytes]:
    """Return the bytes of each row of a sample from a position on; not of embeddings, equal for equal tokens."""
    found = []
    for stream, layers in sample._capture.layers.items():
        for layer in layers if stream != "embeddings" else ():
            rows = sample._layers(stream)[layer]
            found += [row.numpy().tobytes() for row, at in zip(rows, sample.positions, strict=True) if at >= first]
    return found


def check(sample: Any, spec: Spec, known: References) -> None:
    """Compare a sample with Hugging Face's rows of what its Spec asks for."""
    sequence, at = tokens(sample.output), wanted(spec, sample.output)
    assert sample.spec == spec
    for stream, layers in sample._capture.layers.items():
        for layer in layers:
            whole = expected_rows(known.of(sequence), stream, layer)
            right = whole[at] if spec.reduce is None else whole[at].mean(0, keepdim=True)
            assert error(sample._layers(stream)[layer], right, whole.square().mean().sqrt()) < TOLERANCE
    assert sample.positions.tolist() == (at if spec.reduce is None else at[-1:])
    places = {name: list(layers) for name, layers in sample._capture.layers.items()}
    assert places == {name: list(layers) for name, layers in asked_places(spec).items()}


def asked_places(spec: Spec) -> dict[str, list[int]]:
    """Return the streams and layers that one of `SPECS` asks for."""
    layers = list(range(4)) if spec.hidden_states == "all" else [layer % 4 for layer in spec.hidden_states or ()]
    found = {"embeddings": [0] if spec.embeddings else [], "hidden_states": layers}
    found["final_hidden_states"] = [3] if spec.final_hidden_states else []
    return {name: layers for name, layers in found.items() if layers}


def test_requests_of_many_specs_and_clients_with_aborts_and_preemption(engine, known, tmp_path):
    """64 requests, 12 Specs, 3 processes: every row is Hugging Face's, and no memory has a row of another client."""
    given = prompts([7 + 13 * n % 90 for n in range(NUM_REQUESTS)], seed=21)
    specs = [SPECS[n % len(SPECS)] for n in range(NUM_REQUESTS)]
    fields = [
        {"max_tokens": NEW_TOKENS[n % len(NEW_TOKENS)], "temperature": 0.0, "ignore_eos": True}
        for n in range(NUM_REQUESTS)
    ]
    own = Recording(engine.llm, specs[::NUM_CLIENTS])
    marked: list[Any] = [None] * NUM_REQUESTS
    for n, each in enumerate(fields[::NUM_CLIENTS]):
        marked[NUM_CLIENTS * n] = own.mark(greedy(**each), n)
    others = []
    try:
        for number in range(1, NUM_CLIENTS):
            folder = tmp_path / str(number)
            folder.mkdir()
            mine = slice(number, None, NUM_CLIENTS)
            (folder / "asked").write_bytes(pickle.dumps((specs[mine], fields[mine])))
            others.append(Client(folder, connect(engine.llm).addresses, inspect.getsource(rows_in) + MIXED_CLIENT))
            marked[mine] = pickle.loads((folder / "marked").read_bytes())
        outputs = run_with_aborts(engine, given, marked)
        result = own.finish(outputs[::NUM_CLIENTS])
        samples = {0: [result[n] for n, output in enumerate(result.outputs) if output is not None]}
        foreign = [row for sample in samples[0] for row in rows_at(sample, MAY_BE_ALIKE)]
        for number, client in enumerate(others, 1):
            (client.folder / "outputs").write_bytes(pickle.dumps(outputs[number::NUM_CLIENTS]))
            (client.folder / "foreign").write_bytes(pickle.dumps(foreign))
            client.go_on()
            client.said("done")
            samples[number], num_parts, num_found = pickle.loads((client.folder / "rows").read_bytes())
            assert num_parts > 1
            assert not num_found
            foreign += [row for sample in samples[number] for row in rows_at(sample, MAY_BE_ALIKE)]
        assert_memory_is_own(engine, samples)
        for number, mine in samples.items():
            asked = [spec for spec, output in zip(specs, outputs, strict=True)][number::NUM_CLIENTS]
            done = [spec for spec, output in zip(asked, outputs[number::NUM_CLIENTS], strict=True) if output]
            for sample, spec in zip(mine, done, strict=True):
                check(sample, spec, known)
    finally:
        for client in others:
            client.process.kill()
            client.process.wait()


STREAMING_CLIENT = """
import sys
from vllm_tap import Recording, Spec
from vllm_tap.client.connection import Connection

recording = Recording(Connection.at(sys.argv[2:]), Spec(hidden_states="all"), budget_bytes=1 << 18, on_full="spill")
print("capture", recording.capture_id, flush=True)
taken = []
for line in sys.stdin:
    taken.append(recording.take())
    print("taken", flush=True)
"""

FREE_AGAIN_S = 5.0


def test_a_streaming_client_that_is_killed_leaves_neither_memory_nor_files(engine, known, tmp_path):
    """Killed with rows that it has taken, others that it has not, in memory and in files; its requests go on."""
    (before,) = engine.status()
    client = Client(tmp_path, connect(engine.llm).addresses, STREAMING_CLIENT)
    try:
        for _ in range(2):
            run(engine, [client.mark(n) for n in range(8)], seed=33)
            client.go_on()
            client.said("taken")
        run(engine, [client.mark(n) for n in range(8)], seed=33)
        (state,) = engine.status()
        assert state["used_bytes"] > before["used_bytes"]
        assert state["spilled_bytes"] > 1 << 18
    finally:
        client.process.kill()
        client.process.wait()

    def is_free() -> bool:
        (state,) = engine.status()
        names = "used_bytes", "spilled_bytes", "capacity_bytes"
        return all(state[name] <= before[name] for name in names) and not state["captures"]

    wait_until(is_free, "the end of what a killed client held", FREE_AGAIN_S)
    compare(engine.capture(prompts(), Spec(hidden_states="all")), known)


def test_the_last_position_alone_moves_less_than_a_hundredth(engine):
    """Of the bytes of all positions, as the worker counts what it writes."""
    given, moved = prompts([200, 300, 250], seed=40), {}
    for positions in ("all", "last"):
        rows = engine.capture(given, Spec(hidden_states="all", positions=positions))
        (state,) = engine.status()
        moved[positions] = state["num_bytes"]
        assert state["num_bytes"] == rows.num_bytes
    assert 0 < moved["last"] < moved["all"] / 100


def run_with_aborts(engine: Engine, given: list[Any], params: list[Any]) -> list[Any]:
    """Run all requests at once and abort some while they run; return outputs, None for those that were aborted."""
    before = num_preemptions(engine)
    added = [stepping.add(engine.llm, *each, None, None) for each in zip(given, params, strict=True)]
    number_of = {each.request_id: number for number, each in enumerate(added)}
    outputs: list[Any] = [None] * len(given)
    doomed = [n for n in range(len(given)) if n % 11 == 3]
    num_steps = 0
    while engine.llm.llm_engine.has_unfinished_requests():
        for output in stepping.step(engine.llm):
            outputs[number_of[output.request_id]] = output
        num_steps += 1
        if num_steps % 12 == 0 and doomed:
            number = doomed.pop()
            stepping.abort(engine.llm, added[number].inside)
    assert 2 <= sum(output is None for output in outputs) < 6
    assert num_preemptions(engine) > before
    return outputs


def num_preemptions(engine: Engine) -> float:
    """Return how often a request lost its place in the engine's cache."""
    return sum(metric.value for metric in engine.llm.get_metrics() if metric.name == "vllm:num_preemptions")


def assert_memory_is_own(engine: Engine, samples: dict[int, list[Any]]) -> None:
    """The memory that this process may map has its own rows and none of the others."""
    memory = []
    for reader in connect(engine.llm).readers().values():
        for number in range(1, 40):
            with contextlib.suppress(TransportError):
                memory.append(reader.segment_array(number).tobytes())
    own = rows_at(samples[0][0], MAY_BE_ALIKE)
    assert any(rows_in(part, own) for part in memory)  # the search finds what is there
    foreign = [row for number in (1, 2) for sample in samples[number] for row in rows_at(sample, MAY_BE_ALIKE)]
    assert not any(rows_in(part, foreign) for part in memory)


@pytest.mark.parametrize("positions", ["generated", "last", "prompt"])
def test_a_shared_prefix_of_512_tokens_is_read_from_the_cache(engine, known, positions):
    """Where no row of it is asked for: rows equal those of a run without the cache; no row of "prompt" is missing."""
    prefix, *ends = (prompt["prompt_token_ids"] for prompt in prompts([512, 20, 25], seed=30))
    first, second = ({"prompt_token_ids": prefix + end} for end in ends)
    engine.generate([first])
    spec = Spec(hidden_states="all", positions=positions)
    cached = engine.capture([second], spec)
    assert cached.outputs[0].num_cached_tokens == (0 if positions == "prompt" else 512)
    whole = engine.capture([second], spec, sampling_params=greedy(skip_reading_prefix_cache=True))
    assert whole.outputs[0].num_cached_tokens == 0
    assert cached[0].positions.tolist() == whole[0].positions.tolist()
    assert len(cached[0]) == {"generated": MAX_NEW_TOKENS - 1, "last": 1, "prompt": 537}[positions]
    at = whole[0].positions.tolist()
    for result in (cached, whole):
        compare(result, known, lambda *_: at)
