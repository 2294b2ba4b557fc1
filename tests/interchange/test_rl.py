"""SkyRL, verl, verifiers and vLLM, unmodified, over our replay records. Skips where they are not installed.

Without an engine.
"""

from __future__ import annotations

import numpy as np
import pytest

import replay_records
from readers import allow_typed_dicts, reader
from vllm_tap.interchange import envelopes


def test_skyrl_accepts_the_array_and_the_envelope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compaction changes nothing, its decoder reads our envelope, its trace joins two turns."""
    reader("skyrl")
    allow_typed_dicts(monkeypatch)
    from skyrl.backends.skyrl_train.inference_servers.generate_wire import decode_packed_routed_experts
    from skyrl.backends.skyrl_train.utils.routed_experts import RoutedExpertTrace, compact_routed_expert_indices

    for record in replay_records.records():
        compact = compact_routed_expert_indices(record.ids)
        assert np.array_equal(compact, record.ids)
        read = decode_packed_routed_experts(envelopes.skyrl(record))
        assert np.array_equal(read, record.ids)
        assert read.dtype == compact.dtype

    whole = replay_records.record(20)
    first, second = replay_records.part(whole, 0, 9), replay_records.part(whole, 9, 20)
    trace = RoutedExpertTrace()
    trace.record_generation(prompt_token_count=6, generated_token_count=4, routed_experts=first.ids)
    assert trace.prompt_start == second.start
    trace.record_generation(prompt_token_count=14, generated_token_count=7, routed_experts=second.ids)
    final = trace.finalize(token_count=21, loss_mask=[0] * 14 + [1] * 7)
    assert np.array_equal(final, whole.ids)


def test_verl_lays_it_out_as_we_do() -> None:
    """`AgentLoopOutput.as_dict` of the array is our layout without padding."""
    reader("verl")
    agent_loop = reader("verl.experimental.agent_loop.agent_loop")
    for record in replay_records.records():
        output = agent_loop.AgentLoopOutput(
            prompt_ids=list(range(5)),
            response_ids=list(range(record.num_tokens - 5)),
            response_mask=[1] * (record.num_tokens - 5),
            routed_experts=record.ids,
            metrics=agent_loop.AgentLoopMetrics(),
        )
        theirs = output.as_dict()["routed_experts"].numpy()
        ours = envelopes.verl(record)
        assert theirs.dtype == ours.dtype == np.int16
        assert np.array_equal(theirs, ours[0])


def test_verifiers_attributes_rows_to_messages() -> None:
    """Two turns with `start`: a row for each token of a message; the next turn corrects the last row of one."""
    graph = reader("verifiers.v1.graph")
    from types import SimpleNamespace

    whole = replay_records.record(20)
    lengths = [6, 4, 4, 7]
    nodes = [
        SimpleNamespace(token_ids=[0] * count, routed_experts=None, sampled=number % 2 == 1)
        for number, count in enumerate(lengths)
    ]
    trace = SimpleNamespace(nodes=nodes)
    first = envelopes.prime_rl(replay_records.part(whole, 0, 9))
    second = envelopes.prime_rl(replay_records.part(whole, 9, 20))
    graph._attribute_routed_experts(trace, [], [0, 1], 0, first)
    assert np.array_equal(nodes[1].routed_experts[-1], whole.ids[8])
    graph._attribute_routed_experts(trace, [0, 1], [2, 3], 10, second)
    joined = np.concatenate([node.routed_experts for node in nodes])
    assert np.array_equal(joined, np.concatenate([whole.ids, whole.ids[-1:]]))


def test_vllm_encodes_it_the_same() -> None:
    """The text of vLLM's server is ours."""
    serial_utils = reader("vllm.utils.serial_utils")
    for record in replay_records.records():
        if hasattr(serial_utils, "numpy2base64"):
            assert serial_utils.numpy2base64(envelopes.vllm(record)) == envelopes.vllm_http(record)
