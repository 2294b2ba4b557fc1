"""Checks every row of a capture against Hugging Face, from vLLM's outputs alone; trusts none of the package's labels.

Runs in the test process. A row is wrong (its values are another row's), or the sample is: rows lost, doubled, or out of
order.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
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

BATCH_TOKENS = 4096
"""Tokens, padding included, that the reference runs at once."""


class Completion(NamedTuple):
    """One finished sequence of a capture."""

    sample: int
    number: int
    prompt_len: int
    token_ids: list[int]


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
        before = self.num_rows
        for batch in _batches(completions(result.outputs)):
            references = self._reference.run_batch([completion.token_ids for completion in batch])
            for completion, reference in zip(batch, references, strict=True):
                verdict = compare(result, completion, reference)
                self.num_rows += verdict.num_rows
                self.num_wrong += verdict.num_wrong
                self.error = max(self.error, verdict.error)
        return self.num_rows - before


def compare(result: Any, completion: Completion, reference: Reference) -> Verdict:
    """Compare the rows of one sequence, all streams and layers, with the reference."""
    at = wanted(result.spec.positions, completion.prompt_len, completion.token_ids)
    rows = result.sample(completion.sample, completion.number)
    labels = [[p, completion.token_ids[p]] for p in at]
    if torch.stack([rows.positions, rows.token_ids], 1).tolist() != labels or len(rows) != len(at):
        return Verdict(len(at), max(len(at), len(rows)), 0.0)
    if not at:
        return Verdict(0, 0, 0.0)
    errors = torch.zeros(len(at))
    for actual, expected in _pairs(result.spec, rows, reference):
        if actual.shape != (len(at), expected.shape[1]):
            return Verdict(len(at), max(len(at), len(actual)), 0.0)
        # The scale is that of the whole sequence: a single row may be small. NaN is above every tolerance.
        scale = expected.square().mean().sqrt()
        errors = torch.maximum(errors, (actual - expected[at]).abs().amax(1).nan_to_num(torch.inf) / scale)
    good = errors <= TOLERANCE
    return Verdict(len(at), int((~good).sum()), float(errors[good].max()) if good.any() else 0.0)


def _pairs(spec: Any, rows: Any, reference: Reference) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (captured, expected) for each stream and layer that was asked for."""
    num_layers = len(reference.hidden_states)
    for stream in ("hidden_states", "attention_output", "mlp_output"):
        chosen = getattr(spec, stream) or ()
        for layer in range(num_layers) if chosen == "all" else {layer % num_layers for layer in chosen}:
            yield getattr(rows, stream)[layer], getattr(reference, stream)[layer]
    if spec.embeddings:
        yield rows.embeddings, reference.embedding
    if spec.final_hidden_states:
        yield rows.final_hidden_states, reference.final_normed


def _batches(every: list[Completion]) -> Iterator[list[Completion]]:
    """Put sequences of like length together, so that little is padded."""
    batch: list[Completion] = []
    for completion in sorted(every, key=lambda completion: len(completion.token_ids)):
        if (len(batch) + 1) * len(completion.token_ids) > BATCH_TOKENS and batch:
            yield batch
            batch = []
        batch.append(completion)
    if batch:
        yield batch
