"""Statements that must hold of captures of the same prompts, whatever the model: one check each.

Runs in the user's process. Nothing here asks the engine: it is the engine's word that is checked.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_tap.cli.table import layer_text
from vllm_tap.errors import SpecError

FLOAT32_TOLERANCE: Final = 1e-4
HALF_TOLERANCE: Final = 2**-5
"""Largest difference that two runs may have, relative to the largest value of a layer: sums in another order, a few
units in the last place per layer (2 ** -8 of bfloat16, 1.2e-7 of float32). Rows of other tokens differ by about one."""

NORM_TOLERANCE: Final = 0.02
"""Root mean square of what no norm explains, relative to the final hidden states; bfloat16 rounds by 0.002. The last
layer's delta or the layer before leaves 0.2 and more."""

REFERENCE_TOLERANCE: Final = {"float32": 1e-3, "half": 0.1}
"""Median over rows of |difference| / |row|. A model in bfloat16 is a few hundredths off one in float32."""

Rows = npt.NDArray[np.float32]


class Check(NamedTuple):
    """One line of the report."""

    name: str
    num_rows: int
    holds: bool
    text: str


class Difference(NamedTuple):
    """Distance of two captures: the largest relative difference and its place; 0 when their bytes are equal."""

    error: float
    place: str


def generated(outputs: Sequence[Any]) -> list[list[int]]:
    """Return the generated tokens of each output."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def labels(result: Any, prompts: Sequence[Any]) -> Check:
    """Every row has the token and the position of the final sequence; `capture` refuses anything else."""
    expected = 0
    for sample, prompt in zip(result, prompts, strict=True):
        ids = prompt["prompt_token_ids"]
        if sample.token_ids[: len(ids)].tolist() != ids or sample.positions.tolist() != list(range(len(sample))):
            return Check("labels", result.num_rows, False, "rows are labelled with tokens that were not asked for")
        expected += len(sample)
    if expected != result.num_rows:
        return Check("labels", result.num_rows, False, f"{expected} rows expected")
    return Check("labels", result.num_rows, True, "token id and position of every row, prompt and generated")


def finite(result: Any) -> Check:
    """No row holds what is not a number: memory that was never written would."""
    for stream, layer in places(result):
        if not np.isfinite(rows(result, stream, layer)).all():
            return Check("finite", result.num_rows, False, f"{stream}[{layer}] has values that are not finite")
    return Check(
        "finite", result.num_rows, True, ", ".join(f"{name} ({layer_text(on)})" for name, on in result.layers.items())
    )


def tokens(result: Any, before: list[list[int]], plain: Callable[[], list[list[int]]]) -> Check:
    """Greedy generation gives the same tokens with and without capture, as far as it repeats itself without."""
    name, captured = "tokens", generated(result.outputs)
    num_tokens = sum(map(len, captured))
    after = before if captured == before else plain()
    steady = [index for index in range(len(before)) if before[index] == after[index]]
    differing = [index for index in steady if captured[index] != before[index]]
    if differing:
        index = differing[0]
        return Check(name, num_tokens, False, f"prompt {index}: {captured[index]} captured, {before[index]} without")
    if not steady:
        return Check(name, 0, True, "not compared: this engine does not repeat its own tokens without capture either")
    num_unsteady = len(before) - len(steady)
    beside = f"; {num_unsteady} prompts left out that do not repeat without capture" if num_unsteady else ""
    return Check(name, num_tokens, True, f"equal with and without capture{beside}")


def places(result: Any) -> list[tuple[str, int]]:
    """Return every (stream, layer) of a capture."""
    return [(stream, layer) for stream, layers in result.layers.items() for layer in layers]


def rows(result: Any, stream: str, layer: int) -> Rows:
    """Return the rows of a layer over all samples in float32."""
    found: Rows = result.rows(stream, layer).float().numpy()
    return found


def difference(first: Any, second: Any) -> Difference:
    """Compare two captures of the same prompts."""
    if first.sequences.token_ids.tolist() != second.sequences.token_ids.tolist():
        return Difference(np.inf, "other tokens were generated")
    worst = Difference(0.0, "")
    for stream, layer in places(first):
        if first.rows(stream, layer).equal(second.rows(stream, layer)):
            continue
        one, other = rows(first, stream, layer), rows(second, stream, layer)
        error = float(np.abs(one - other).max() / max(np.abs(one).max(), np.finfo(np.float32).tiny))
        if error > worst.error:
            worst = Difference(error, f"{stream}[{layer}]")
    return worst


def tolerance(result: Any) -> float:
    """Return what two runs of this model may differ by."""
    return FLOAT32_TOLERANCE if _kind(result) == "float32" else HALF_TOLERANCE


def _kind(result: Any) -> str:
    dtype = str(result.rows("hidden_states", result.layers["hidden_states"][0], 0, 1).dtype)
    return "float32" if dtype == "torch.float32" else "half"


def repetition(first: Any, noise: Difference) -> Check:
    """The same prompts captured again give the same rows."""
    return _compared("repetition", first, noise)


def way(name: str, first: Any, other: Any, noise: Difference) -> Check:
    """Rows that came another way have the same bytes, or differ as little as two runs of this engine do."""
    found = difference(first, other)
    if noise.error == 0 and found.error > 0:
        return Check(name, first.num_rows, False, f"{_far(found)}, and the engine itself repeats every byte")
    return _compared(name, first, found)


def _compared(name: str, first: Any, found: Difference) -> Check:
    if found.error == 0:
        return Check(name, first.num_rows, True, "equal bytes")
    limit = tolerance(first)
    return Check(name, first.num_rows, found.error <= limit, f"{_far(found)} (allowed: {limit:.1g})")


def _far(found: Difference) -> str:
    return f"off by {found.error:.2g} of the largest value in {found.place}" if found.error < np.inf else found.place


def embeddings(result: Any) -> Check:
    """Equal tokens have equal embeddings, or equal tokens at equal positions where the model adds positions."""
    ids, starts = result.sequences.token_ids, result.sequences.starts
    positions = np.concatenate([np.arange(stop - start) for start, stop in itertools.pairwise(starts)])
    found = rows(result, "embeddings", 0)
    by_token = _one_row_each(found, [(token,) for token in ids.tolist()])
    if by_token:
        return Check("embeddings", by_token, True, "equal tokens have equal rows")
    by_place = _one_row_each(found, list(zip(ids.tolist(), positions.tolist(), strict=True)))
    if by_place:
        return Check("embeddings", by_place, True, "equal tokens at equal positions have equal rows")
    return Check("embeddings", len(ids), False, "equal tokens at equal positions have rows that differ")


def _one_row_each(found: Rows, keys: list[tuple[int, ...]]) -> int:
    """Return how many rows repeat the row of an equal key; 0 if any does not, or there is none."""
    first: dict[tuple[int, ...], int] = {}
    repeated = 0
    for row, key in enumerate(keys):
        before = first.setdefault(key, row)
        if before == row:
            continue
        if not np.array_equal(found[before], found[row]):
            return 0
        repeated += 1
    return repeated


def final_norm(result: Any) -> Check:
    """The final hidden states are a norm of the last layer's rows: one scale and shift per channel explain all rows.

    The weights of the norm stay in the engine. They are fitted: two numbers per channel, for as many rows as there are.
    """
    convention = result.conventions["hidden_states"]
    last, final = rows(result, "hidden_states", -1), rows(result, "final_hidden_states", -1)
    left = {kind: _unexplained(normed, final) for kind, normed in _normed(last.astype(np.float64)).items()}
    kind = min(left, key=left.__getitem__)
    text = f"{kind} of the last layer leaves {left[kind]:.1g} (allowed: {NORM_TOLERANCE}); convention: {convention}"
    return Check("final norm", len(last), left[kind] <= NORM_TOLERANCE, text)


def _normed(states: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
    centred = states - states.mean(-1, keepdims=True)
    return {
        "RMS norm": states / np.sqrt(np.square(states).mean(-1, keepdims=True)),
        "layer norm": centred / np.sqrt(np.square(centred).mean(-1, keepdims=True)),
    }


def _unexplained(normed: npt.NDArray[np.float64], final: Rows) -> float:
    """Fit final = scale * normed + shift per channel, and return what is left."""
    inputs, outputs = normed - normed.mean(0), final - final.mean(0, dtype=np.float64)
    scale = (inputs * outputs).sum(0) / np.maximum(np.square(inputs).sum(0), np.finfo(np.float64).tiny)
    left = outputs - scale * inputs
    return float(np.sqrt(np.square(left).mean() / np.square(final, dtype=np.float64).mean()))


# -------------------------------------------------------------------------------------------------------- the reference


def require_reference(model: str) -> None:
    """Refuse `--reference` before an engine starts where it could not be had.

    Raises:
        SpecError: transformers is missing, or the model is not a local folder.
    """
    if importlib.util.find_spec("transformers") is None:
        raise SpecError("--reference needs the package transformers, which comes with vLLM.")
    if not (Path(model) / "config.json").is_file():
        raise SpecError(f"--reference needs the weights here: {model} is not a folder with a config.json.", path=model)


def reference(result: Any, model: str) -> Check:
    """Each layer's rows are near those of a forward pass of transformers, and nearer than those of its neighbours."""
    expected = _forward(result, model)
    if expected is None:
        return Check("reference", 0, False, "transformers has no list of as many decoder layers for this model")
    captured = {layer: rows(result, "hidden_states", layer) for layer in result.layers["hidden_states"]}
    errors = {layer: _median_error(captured[layer], expected[layer]) for layer in captured}
    worst = max(errors, key=errors.__getitem__)
    limit = REFERENCE_TOLERANCE[_kind(result)]
    for layer in captured:
        for beside in (layer - 1, layer + 1):
            if beside in expected and _median_error(captured[layer], expected[beside]) <= errors[layer]:
                return Check(
                    "reference", result.num_rows, False, f"layer {layer} is nearer to layer {beside} of transformers"
                )
    text = f"layer {worst}, the worst, is off by {errors[worst]:.2g} of a row (median; allowed: {limit:.1g})"
    return Check("reference", result.num_rows, errors[worst] <= limit, text)


def _median_error(found: Rows, expected: Rows) -> float:
    """Return the median over rows of |difference| / |row|; a median, since a few tokens are a hundred times larger."""
    return float(np.median(np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)))


def _forward(result: Any, model: str) -> dict[int, Rows] | None:
    """Return the rows after each decoder layer, over all samples, from transformers; None where there are no layers."""
    from transformers import AutoModelForCausalLM, BatchEncoding

    peer = AutoModelForCausalLM.from_pretrained(model, dtype="float32", local_files_only=True)
    peer.train(False).requires_grad_(False)
    lists = [
        module
        for name, module in peer.named_modules()
        if type(module).__name__ == "ModuleList" and len(module) == result.num_layers and "vision" not in name
    ]
    if len(lists) != 1:
        return None
    seen: dict[int, list[Rows]] = {layer: [] for layer in range(result.num_layers)}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            seen[layer].append(states.reshape(-1, states.shape[-1]).numpy().copy())

        return hook

    for layer, module in enumerate(lists[0]):
        module.register_forward_hook(keep(layer))
    for sample in result:
        peer(**BatchEncoding({"input_ids": [sample.token_ids.tolist()]}, tensor_type="pt"), use_cache=False)
    return {layer: np.concatenate(pieces) for layer, pieces in seen.items()}
