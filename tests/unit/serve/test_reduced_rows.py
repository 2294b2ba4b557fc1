"""One row for each sample, from a server's reply to its client."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest

from host_engine import HostClient, HostEngine, Prompt
from vllm_tap import Recording, Spec
from vllm_tap.client.bodies import Samples
from vllm_tap.frame import body
from vllm_tap.serve.reply import Reply
from vllm_tap.spec import NAMED_POSITIONS, REDUCTIONS

TOKENS = [1, 2, 3, 4, 5]


@pytest.mark.parametrize("positions", ["all", *NAMED_POSITIONS, (0, -1)], ids=str)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_client_reads_the_row_that_was_captured(reduce: str, positions: Any) -> None:
    """With the label of the last row that it is made of."""
    engine = HostEngine(random.Random(7), drafts=False)
    client, prompt = HostClient(engine), Prompt("0", TOKENS, [[3, 4, 5]])
    recording = Recording(client, Spec(hidden_states=[0, 2], positions=positions, reduce=reduce))
    params = SimpleNamespace(n=1, max_tokens=3, extra_args=None, skip_reading_prefix_cache=False)
    prompt.requests[0].params.append((client, recording.mark(params, 0)))
    for _ in engine.run(prompt.requests):
        pass
    output = prompt.output()
    captured = recording.finish([output])

    frames: list[bytes] = []
    kept: Any = SimpleNamespace(add=lambda result, frame: frames.append(frame), end=lambda *_: None)
    reply = Reply(kept, SimpleNamespace(id="x", total_bytes=1), {"hidden_states": [0, 2]})  # type: ignore[arg-type]
    asyncio.run(reply.add(reply.expect(), captured, True))
    assert not reply.end(0, output)
    reader = Samples()
    for frame in body.Reader().feed(b"".join(map(bytes, frames))):
        reader.add(frame)
    (sample,) = reader.samples()
    assert len(sample) == 1
    assert sample.positions.equal(captured[0].positions)
    for layer in (0, 2):
        assert sample.hidden_states[layer].equal(captured[0].hidden_states[layer])
