"""Starts and ends vLLM engines for tests, and compares what was captured from them with Hugging Face.

Runs in the test process; each engine is a handful of processes of its own, which are watched until they are gone.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import device
import vllm_tap
from device import TOLERANCE
from quick_start import quick_start
from reference import Reference, ReferenceModel
from routing import in_order
from vllm_tap.streams import STREAMS

FULL_MATRIX = os.environ.get("VLLM_TAP_TEST_MATRIX") == "full"
"""Whether to start an engine for every combination rather than for a subset that covers each side."""

MAX_MODEL_LEN = 256
MAX_NEW_TOKENS = 8
TRANSPORTS = ["segment", "inline", "tcp"]
HAS_NIXL = importlib.util.find_spec("nixl") is not None
NETWORKS = {"VLLM_TAP_LISTEN": "127.0.0.1:0", **({"VLLM_TAP_NIXL": "1"} if HAS_NIXL else {})}
"""What tells workers to listen, for transport="tcp", and "nixl" where that is installed."""
DEADLINE_S = 20.0

# The longest prompt takes three steps of 64 tokens, and several short ones share a step with a piece of it.
PROMPT_LENGTHS = (3, 17, 64, 5, 130, 33, 1, 9)

DENSE = {kind.field: "all" if kind.per_layer else True for kind in STREAMS if kind.part != "router"}
"""Arguments of the `Spec` that asks for all that a model without experts has."""

ARGUMENTS = {
    "dtype": "float32",
    "max_model_len": MAX_MODEL_LEN,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 16,
}


def prompts(lengths: Sequence[int] = PROMPT_LENGTHS, seed: int = 0) -> list[dict[str, list[int]]]:
    """Return prompts of random token ids, none of them special."""
    rng = np.random.default_rng(seed)
    return [{"prompt_token_ids": rng.integers(0, 256, length).tolist()} for length in lengths]


@contextmanager
def surroundings(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class Process:
    """A process that an engine has started; known by a descriptor, so that no later process is taken for it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def is_gone(self, timeout_s: float = 0.0) -> bool:
        """Tell whether the process has ended, or ends within a time."""
        poll = select.poll()  # for numbers of descriptors that `select` does not take
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(1000 * max(timeout_s, 0.0)))

    def close(self) -> None:
        """Forget the process."""
        os.close(self._fd)


class Engine:
    """A vLLM engine and its processes."""

    def __init__(self, folder: Path, *, listens: bool = False, **arguments: Any) -> None:
        """Start it.

        Args:
            folder: Of the model.
            listens: Whether workers listen on loopback.
            arguments: For vLLM.
        """
        from vllm import LLM

        with quick_start(), surroundings(NETWORKS if listens else {}):
            before = _children()
            self.llm: Any = LLM(str(folder), **device.engine_arguments(**{**ARGUMENTS, **arguments}))
        self.processes = [Process(pid) for pid in sorted(_children() - before)]

    def generate(self, given: Sequence[Any], **sampling: Any) -> list[list[int]]:
        """Return the tokens of plain greedy generation, per prompt."""
        outputs = self.llm.generate(list(given), greedy(**sampling), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def capture(self, given: Any, spec: Any, **options: Any) -> Any:
        """Capture with greedy sampling of a fixed length, unless told otherwise."""
        if "sampling_params" not in options:
            sampling = {"temperature": 0.0, "ignore_eos": True, "max_tokens": MAX_NEW_TOKENS}
            options = {**sampling, **options}
        return vllm_tap.capture(self.llm, given, spec, **{"progress": False, **options})

    def status(self) -> list[dict[str, Any]]:
        """Return what each worker holds, in order of rank."""
        return sorted(self.llm.collective_rpc("vllm_tap_status"), key=lambda state: state["rank"])

    def used_bytes(self) -> int:
        """Return how many bytes of rows the workers hold for captures."""
        return sum(state["used_bytes"] for state in self.status())

    def is_gone(self, timeout_s: float = 0.0) -> bool:
        """Tell whether all processes have ended, or end within a time."""
        deadline = time.monotonic() + timeout_s
        return all(process.is_gone(deadline - time.monotonic()) for process in self.processes)

    def close(self) -> None:
        """Let go of the engine, as a user does, and fail if a process outlives it."""
        self.llm = None
        forget_failures()
        gone = self.is_gone(DEADLINE_S)
        left = [process for process in self.processes if not process.is_gone()]
        for process in left:
            os.kill(process.pid, 9)
        for process in self.processes:
            process.close()
        self.processes = []
        assert gone, f"processes {[process.pid for process in left]} of the engine outlived it by {DEADLINE_S} s"


def forget_failures() -> None:
    """Let go of what Python keeps of the last test that failed: its frames, and the engine and rows in them."""
    sys.last_exc = sys.last_value = sys.last_traceback = None  # type: ignore[attr-defined]
    gc.collect()


def _children() -> set[int]:
    """Return the processes below this one, without Python's own helpers, which stay for its whole life."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if "resource_tracker" not in " ".join(process.cmdline()):
                found.add(process.pid)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


class Shelf:
    """At most one engine, started when it is asked for, and again when a test has ended it."""

    def __init__(self, start: Callable[[], Engine]) -> None:
        self._start = start
        self._engine: Engine | None = None

    def get(self) -> Engine:
        """Return a running engine."""
        if self._engine is not None and any(process.is_gone() for process in self._engine.processes):
            self._engine.close()
        if self._engine is None or self._engine.llm is None:
            self._engine = self._start()
        return self._engine

    def close(self) -> None:
        """End the engine if there is one."""
        if self._engine is not None and self._engine.llm is not None:
            self._engine.close()


def greedy(**fields: Any) -> Any:
    """Return vLLM's parameters for greedy sampling of a fixed length, with other fields on top."""
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": MAX_NEW_TOKENS, **fields})


class References:
    """Hugging Face's forward passes over whole sequences, each run once."""

    def __init__(self, folder: Path) -> None:
        self._model = ReferenceModel(folder)
        self._known: dict[tuple[int, ...], Reference] = {}

    def of(self, token_ids: Sequence[int]) -> Reference:
        """Return the forward pass over a sequence."""
        key = tuple(token_ids)
        if key not in self._known:
            self._known[key] = self._model.run(key)
        return self._known[key]

    def outputs_of(self, token_ids: Sequence[int]) -> Any:
        """Return what the model itself returns when it is asked for hidden states, and for router logits if it has."""
        model = self._model.model.base_model
        with torch.inference_mode():
            return model(
                self._model.tensor([list(token_ids)]),
                use_cache=False,
                output_hidden_states=True,
                **({"output_router_logits": True} if self._model.routers else {}),
            )

    def choices_of(self, token_ids: Sequence[int]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Return {layer: ids and weights that the model's own router returns}, ids ascending, as `routing.in_order`."""
        found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(layer: int) -> Callable[..., None]:
            return lambda _module, _args, output: found.__setitem__(layer, in_order(output[2].cpu(), output[1].cpu()))

        hooks = [gate.register_forward_hook(keep(layer)) for layer, gate in self._model.routers.items()]
        self.outputs_of(token_ids)
        for hook in hooks:
            hook.remove()
        return found


def sequence(output: Any, completion: int = 0) -> list[int]:
    """Return the tokens that went through the model: the prompt, and all generated ones but the last."""
    return [*output.prompt_token_ids, *output.outputs[completion].token_ids[:-1]]


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Return as soon as a condition holds; fail where it does not within the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        os.sched_yield()


def error(actual: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> float:
    """Return the largest difference, relative to a scale."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    return float((actual - expected.to(actual.device)).abs().max() / scale) if actual.numel() else 0.0


def rows_of(sample: Any, stream: str, layer: int) -> torch.Tensor:
    """Return the rows of one stream and layer of a sample, as a user reads them."""
    found = getattr(sample, stream)
    return found if isinstance(found, torch.Tensor) else found[layer]


def expected_rows(reference: Reference, stream: str, layer: int) -> torch.Tensor:
    """Return Hugging Face's rows for one stream and layer."""
    if stream == "hidden_states":
        return reference.hidden_states[layer]
    return {
        "embeddings": reference.embedding,
        "final_hidden_states": reference.final_normed,
        "router_logits": reference.router_logits.get(layer),
        "attention_output": reference.attention_output.get(layer),
        "mlp_output": reference.mlp_output.get(layer),
    }[stream]


largest: dict[str, float] = {}
"""The largest error of each stream that `compare` has seen in this process."""

Positions = Callable[[int, int], list[int]]
"""(length of the prompt, rows of the sequence) to the positions that are to be there."""


def compare(result: Any, references: References, positions: Positions | None = None, completion: int = 0) -> None:
    """Compare every row of every stream, layer and sample of a capture with Hugging Face's, and all labels."""
    for index, output in enumerate(result.outputs):
        tokens, sample = sequence(output, completion), result.sample(index, completion)
        at = list(range(len(tokens))) if positions is None else positions(len(output.prompt_token_ids), len(tokens))
        assert sample.positions.tolist() == at
        assert sample.token_ids.tolist() == [tokens[position] for position in at]
        assert len(sample) == len(at)
        for stream in result.layers:
            for layer in result.layers[stream]:
                whole = expected_rows(references.of(tokens), stream, layer)
                # The scale is that of the whole sequence: a single row may be small.
                off = error(rows_of(sample, stream, layer), whole[at], whole.square().mean().sqrt())
                largest[stream] = max(largest.get(stream, 0.0), off)
                assert off < TOLERANCE, f"sample {index}: {stream}[{layer}] is off by {off:.2g} of its scale"


class Recorded:
    """A dataset with `outputs`, made of its index, for the comparison of captures."""

    def __init__(self, dataset: vllm_tap.Dataset) -> None:
        self._dataset, self.layers = dataset, dataset.layers
        self.outputs = [
            SimpleNamespace(
                prompt_token_ids=sample.prompt_token_ids,
                outputs=[SimpleNamespace(index=0, token_ids=sample.generated_token_ids)],
            )
            for sample in dataset
        ]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._dataset)

    def sample(self, index: int, completion: int) -> Any:
        """Return a sample."""
        return self._dataset.sample(index, completion)


def compare_with_outputs(result: Any, references: References) -> None:
    """Compare `as_hf()` of every sample with what Hugging Face's model returns, tensor by tensor."""
    for sample, output in zip(result, result.outputs, strict=True):
        theirs, ours = references.outputs_of(sequence(output)), sample.as_hf()
        if ours.router_logits and getattr(theirs, "router_logits", None) is None:
            pytest.skip(f"the installed transformers gives no router logits as {type(theirs).__name__}")
        for name, found in ours.items():
            for index, (one, other) in enumerate(zip(found, theirs[name], strict=True)):
                off = error(one, other, other.square().mean().sqrt())
                assert off < TOLERANCE, f"{name}[{index}] is off by {off:.2g} of its scale"
