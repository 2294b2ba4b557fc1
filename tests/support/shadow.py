"""Checks every row of a capture against Hugging Face, from vLLM's outputs alone; trusts none of the package's labels.

Runs in the test process. A row is wrong (its values are another row's), or the sample is: rows lost, doubled, or out of
order.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from device import TOLERANCE
from reference import Reference, ReferenceModel
from vllm_tap.positions import Positions, Tokens
from vllm_tap.spec import Choice

# Both sides compute in float32 (eps 1.2e-7) and add up a few hundred products per element in different orders, layer
# after layer; the scale is the root mean square of the layer's rows over the whole sequence. The largest error over a
# million rows was 5.1e-6; twice that is allowed, and more on a GPU. A row of another token or layer is off by about the
# scale.

REDUCTIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda rows: rows,
    "last": lambda rows: rows[-1:],
    "mean": lambda rows: rows.mean(0, keepdim=True),
    "max": lambda rows: rows.amax(0, keepdim=True),
    "sum": lambda rows: rows.sum(0, keepdim=True),
}

ROUNDING = {None: 0.0, "float32": 0.0, "float16": 2.0**-11, "fp8": 2.0**-4}
"""Relative error of a dtype that rows are asked for in."""

IN_FLOAT = {None: "float32", "fp8": "float32"}
"""Dtype that rows are compared in, where it is not the one that was asked for."""

SMALLEST = 2.0**-10 / 448
"""Error of e4m3 near 0, of the largest number of a row."""

BATCH_TOKENS = 4096
"""Tokens, padding included, that the reference runs at once."""


class Completion(NamedTuple):
    """One finished sequence of a capture."""

    sample: int
    number: int
    prompt_len: int
    token_ids: list[int]


class Joined:
    """Blocks of one sequence that came one by one, put together.

    Attributes:
        spec: What they were asked for by.
        positions: Of all rows, tensor [R].
        token_ids: The same.
    """

    def __init__(self, blocks: Sequence[Any]) -> None:
        self._blocks, self.spec = blocks, blocks[0].spec
        self.positions = torch.cat([block.positions for block in blocks])
        self.token_ids = torch.cat([block.token_ids for block in blocks])

    def __len__(self) -> int:
        return len(self.positions)

    def __getattr__(self, stream: str) -> Any:
        parts = [getattr(block, stream) for block in self._blocks]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}


class Verdict(NamedTuple):
    """What a check has found: rows looked at, rows that are not what they must be, largest error of the others."""

    num_rows: int
    num_wrong: int
    error: float


def completions(outputs: Sequence[Any]) -> list[Completion]:
    """Return the tokens that went through the model, per finished sequence: all but the last generated one."""
    return [
        Completion(
            sample,
            completion.index,
            len(output.prompt_token_ids),
            [*output.prompt_token_ids, *completion.token_ids[:-1]],
        )
        for sample, output in enumerate(outputs)
        if output is not None
        for completion in output.outputs
    ]


def chosen(positions: Positions, prompt_len: int, token_ids: Sequence[int]) -> list[int]:
    """Return the positions that an expression chooses, in a sequence of these tokens."""
    length = len(token_ids)
    tokens = Tokens(
        np.arange(length), np.full(length, prompt_len), np.full(length, length), np.array(token_ids, np.int64)
    )
    return np.flatnonzero(positions.choose(tokens)).tolist()


def wanted(positions: Choice, prompt_len: int, token_ids: Sequence[int]) -> list[int]:
    """Return the positions that a specification asks for, in a sequence of these tokens."""
    length = len(token_ids)
    if isinstance(positions, Positions):
        return chosen(positions, prompt_len, token_ids)
    named = {
        "all": range(length),
        "prompt": range(prompt_len),
        "generated": range(prompt_len, length),
        "last": range(prompt_len - 1, prompt_len),
        "last_prompt": range(prompt_len - 1, prompt_len),
        "last_generated": range(max(prompt_len, length - 1), length),
    }
    if isinstance(positions, str):
        return list(named[positions])
    return sorted({p % prompt_len for p in positions if -prompt_len <= p < prompt_len})


class Shadow:
    """Compares captures with a reference, and counts."""

    def __init__(self, reference: ReferenceModel) -> None:
        self._reference = reference
        self.num_rows = self.num_wrong = 0
        self.error = 0.0
        self.met: collections.Counter[str] = collections.Counter()

    def check(self, result: Any) -> int:
        """Check all rows of a capture; return how many there are."""
        every = completions(result.outputs)
        return self.check_samples([(each, result.sample(each.sample, each.number)) for each in every])

    def check_samples(self, samples: Sequence[tuple[Completion, Any]]) -> int:
        """Check all rows of some sequences; return how many there are."""
        before = self.num_rows
        for batch in _batches(samples):
            references = self._reference.run_batch([completion.token_ids for completion, _ in batch])
            for (completion, rows), reference in zip(batch, references, strict=True):
                verdict = compare(rows, completion, reference)
                self.num_rows += verdict.num_rows
                self.num_wrong += verdict.num_wrong
                self.error = max(self.error, verdict.error)
                if verdict.num_wrong:
                    print(f"WRONG: {verdict} of {completion} by {rows.spec}", flush=True)
        return self.num_rows - before


def compare(rows: Any, completion: Completion, reference: Reference) -> Verdict:
    """Compare the rows of one sequence, all streams and layers, with the reference."""
    spec = rows.spec
    chosen = wanted(spec.positions, completion.prompt_len, completion.token_ids)
    at = chosen if spec.reduce is None else chosen[-1:]
    labels = [[p, completion.token_ids[p]] for p in at]
    if torch.stack([rows.positions, rows.token_ids], 1).tolist() != labels or len(rows) != len(at):
        return Verdict(len(at), max(len(at), len(rows), 1), 0.0)
    if not at:
        return Verdict(0, 0, 0.0)
    errors = torch.zeros(len(at))
    for actual, whole in _pairs(spec, rows, reference):
        expected = REDUCTIONS[spec.reduce](whole[chosen].double())
        if actual.shape != expected.shape or str(actual.dtype) != f"torch.{IN_FLOAT.get(spec.dtype, spec.dtype)}":
            return Verdict(len(at), max(len(at), len(actual)), 0.0)
        # The scale is that of the whole sequence: a single row may be small. A sum is as far off as all its rows are.
        scale = whole.square().mean().sqrt() * (len(chosen) if spec.reduce == "sum" else 1)
        off = (actual.double() - expected).abs() - ROUNDING[spec.dtype] * expected.abs()
        if spec.dtype == "fp8":
            off -= SMALLEST * expected.abs().amax(1, keepdim=True)
        errors = torch.maximum(errors, off.amax(1).nan_to_num(torch.inf).float() / scale)  # NaN is above all tolerances
    good = errors <= TOLERANCE
    return Verdict(len(at), int((~good).sum()), float(errors[good].max()) if good.any() else 0.0)


def _pairs(spec: Any, rows: Any, reference: Reference) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (captured, all rows of the sequence) for each stream and layer that was asked for."""
    num_layers = len(reference.hidden_states)
    for stream in ("hidden_states", "attention_output", "mlp_output"):
        chosen = getattr(spec, stream) or ()
        for layer in range(num_layers) if chosen == "all" else {layer % num_layers for layer in chosen}:
            given = _from_fp8(rows, layer) if spec.dtype == "fp8" else getattr(rows, stream)[layer]
            yield given, getattr(reference, stream)[layer]
    if spec.embeddings:
        yield rows.embeddings, reference.embedding
    if spec.final_hidden_states:
        yield rows.final_hidden_states, reference.final_normed


def _from_fp8(rows: Any, layer: int) -> Tensor:
    elements, scale = rows.hidden_states_fp8[layer], rows.hidden_states_scale[layer]
    return elements.float() * scale if elements.dtype == torch.float8_e4m3fn else elements


def _batches(every: Sequence[tuple[Completion, Any]]) -> Iterator[list[tuple[Completion, Any]]]:
    """Put sequences of like length together, so that little is padded."""
    batch: list[tuple[Completion, Any]] = []
    for completion, rows in sorted(every, key=lambda each: len(each[0].token_ids)):
        if (len(batch) + 1) * len(completion.token_ids) > BATCH_TOKENS and batch:
            yield batch
            batch = []
        batch.append((completion, rows))
    if batch:
        yield batch
