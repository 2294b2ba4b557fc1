"""Checks one family: what a capture gives against a Hugging Face forward pass and against the engine's own modules.

Runs as a process of its own, with the engine inside it: `python architectures/check.py FAMILY`. The last line that it
prints is a JSON object, one row of the table.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "architectures"), str(ROOT / "tests"), str(ROOT / "tests" / "support"), str(ROOT / "src")]

# The engine lives in this process, so that its modules can be asked. One thread: many of these run one after another.
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from families import FAMILIES, MAX_POSITIONS, VOCAB_SIZE, Family  # noqa: E402

from models import _draw_weights, byte_tokenizer  # noqa: E402
from reference import ReferenceModel  # noqa: E402

PROMPT_LENGTHS = (3, 17, 40)
NEW_TOKENS = 4

TOLERANCE = 1e-4
"""Largest difference over the root mean square of the layer's rows. Both sides compute in float32 (eps 1.2e-7) and add
up a few hundred products per element in other orders; scans of state space models add up over the whole sequence. A row
of another token, layer or convention is off by 0.1 or more."""

HALF_TOLERANCE = 0.05
"""The same for the engine's own modules in bfloat16: it rounds once where add and norm are one kernel, the check twice
(2 ** -8 each, of values up to five times the root mean square)."""

OTHER_SHAPE = 1e9
"""The error of rows that do not even have the width that is expected."""

ENTRY_NORMS = (
    "input_layernorm",
    "ln_1",
    "norm",
    "norm_1",
    "pre_norm",
    "operator_norm",
    "self_attn_layer_norm",
    "attention_norm",
    "pre_attention_layernorm",
    "pre_self_attn_layernorm",
    "attention_layernorm",
    "ln_attn",
)
"""What decoder layers call the norm that reads the stream first."""


def main(name: str) -> dict[str, Any]:
    """Check one family and return its row."""
    family, began = FAMILIES[name], time.monotonic()
    row: dict[str, Any] = {"family": name, "status": "not-run", "reason": "", "note": family.note}
    with tempfile.TemporaryDirectory(prefix=f"vllm-tap-{name}-") as folder:
        try:
            make_model(Path(folder), name, family)
        except Exception as error:
            return {**row, "reason": f"transformers cannot make it: {says(error)}"}
        reference = ReferenceProcess(folder)
        try:
            llm = start(folder, family)
            row |= describe(llm)
            row |= examine(llm, reference, family)
            if row["status"] == "wrong" and family.differs and holds(row["engine"], family):
                # The engine's own modules confirm every layer, and why the two models differ is known.
                row |= {"status": "pass", "check": "the engine's norms", "reason": family.differs}
                row |= {"against_hugging_face": row["error"], "error": _worst(flat(row["engine"]))}
                row["router_error"] = _worst(row["engine"]["gates"]) if row["router_layers"] else None
        except Exception as error:
            traceback.print_exc()
            row["reason"] = f"the engine does not start: {says(error)}"
        finally:
            reference.close()
    return {**row, "seconds": round(time.monotonic() - began, 1)}


def says(error: BaseException) -> str:
    """Return an error in one line, with the place where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    file = place.filename.rpartition("site-packages/")[2]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]} ({Path(file).parent.name}/{Path(file).name}:{place.lineno})"


# ------------------------------------------------------------------------------------------------------------ the model


def make_model(folder: Path, name: str, family: Family) -> None:
    """Write configuration and weights; the same family gives the same bytes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**family.configuration()), dtype=torch.float32)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    _draw_weights(model, generator)
    for weight in model.parameters():
        if weight.numel() == 1:
            # vLLM keeps some scalars in bfloat16 whatever the dtype of the model.
            weight.data = weight.data.bfloat16().float()
    for buffer_name, buffer in model.named_buffers():
        # Biases that only choose experts: with zeros, a capture that mixed them in would look right.
        if buffer_name.endswith("bias") and buffer.is_floating_point():
            buffer.normal_(0.0, 0.2, generator=generator)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


class Reference(ReferenceModel):
    """A Hugging Face model whose gates are recomputed from their inputs: some return scores rather than logits."""

    def run(self, token_ids: Any) -> Any:
        """Run one sequence; see `ReferenceModel.run`."""
        logits: dict[int, torch.Tensor] = {}

        def keep(index: int) -> Any:
            def hook(gate: Any, args: Any) -> None:
                rows = args[0].reshape(-1, args[0].shape[-1]).float()
                bias = gate.bias if isinstance(getattr(gate, "bias", None), torch.Tensor) else None
                logits[index] = torch.nn.functional.linear(rows, gate.weight.float(), bias)

            return hook

        with contextlib.ExitStack() as hooks:
            for index, gate in self.routers.items():
                hooks.enter_context(gate.register_forward_pre_hook(keep(index)))
            result = super().run(token_ids)
        result.router_logits.update(logits)
        return result


class ReferenceProcess:
    """The reference in a process of its own: vLLM's Transformers backend changes the classes of transformers in its.

    `why_not` says why it cannot run, or is empty.
    """

    def __init__(self, folder: str) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve_reference, args=(folder, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.why_not: str = self._pipe.recv()
        except EOFError:
            self.why_not = "the process of the reference ended"

    def run(self, token_ids: list[int]) -> dict[str, dict[int, np.ndarray[Any, Any]]]:
        """Run one sequence; return {stream: {layer: rows}}."""
        self._pipe.send(token_ids)
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return dict(answer)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _serve_reference(folder: str, pipe: Any) -> None:
    try:
        reference = Reference(folder)
        reference.run([5, 6, 7])
    except Exception as error:
        pipe.send(says(error))
        return
    pipe.send("")
    while True:
        try:
            seen = reference.run(pipe.recv())
            last = len(seen.hidden_states) - 1
            pipe.send(
                {
                    "hidden_states": {layer: rows.numpy() for layer, rows in enumerate(seen.hidden_states)},
                    "embeddings": {0: seen.embedding.numpy()},
                    "final_hidden_states": {last: seen.final_normed.numpy()},
                    "router_logits": {layer: rows.numpy() for layer, rows in seen.router_logits.items()},
                    "attention_output": {layer: rows.numpy() for layer, rows in seen.attention_output.items()},
                    "mlp_output": {layer: rows.numpy() for layer, rows in seen.mlp_output.items()},
                }
            )
        except EOFError:
            return
        except Exception as error:
            pipe.send(says(error))


# ----------------------------------------------------------------------------------------------------------- the engine


def start(folder: str, family: Family) -> Any:
    """Start the engine in this process."""
    from vllm import LLM

    arguments: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": MAX_POSITIONS // 2,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "skip_tokenizer_init": family.engine.get("runner") != "pooling",
        "disable_log_stats": True,
        **family.engine,
    }
    return LLM(folder, **arguments)


def ask(llm: Any, function: Any) -> Any:
    """Return what a function of the worker returns; the worker is in this process."""
    return llm.collective_rpc(function)[0]


def describe(llm: Any) -> dict[str, Any]:
    """Return the names of vLLM's classes."""

    def names(worker: Any) -> dict[str, Any]:
        from vllm_tap.vllm import runner as vllm_runner

        worker = getattr(worker, "worker", worker)
        found: dict[str, Any] = {
            "vllm_class": type(worker.model_runner.get_model()).__name__,
            "runner": vllm_runner.runner_name(worker.model_runner),
        }
        with contextlib.suppress(Exception):
            layers = worker.vllm_tap.taps.layers
            found["layer_class"] = ", ".join(dict.fromkeys(type(layer).__name__ for layer in layers.values()))
        return found

    return dict(ask(llm, names))


def prompts() -> list[dict[str, list[int]]]:
    """Return prompts of random token ids, none of them special."""
    rng = np.random.default_rng(0)
    return [{"prompt_token_ids": rng.integers(3, 250, length).tolist()} for length in PROMPT_LENGTHS]


def examine(llm: Any, reference: ReferenceProcess, family: Family) -> dict[str, Any]:
    """Capture everything that can be captured and compare it."""
    from vllm_tap import Spec, capture
    from vllm_tap.client.connection import connect
    from vllm_tap.errors import TapError
    from vllm_tap.streams import BLOCK_STREAMS

    try:
        plain(llm)
    except Exception as error:
        traceback.print_exc()
        return {"reason": f"the engine cannot run it: {says(error)}"}
    try:
        connection = connect(llm)
    except TapError as error:
        return {"status": "refused", "reason": str(error)}
    streams = {
        "hidden_states": "all",
        "embeddings": True,
        "final_hidden_states": bool(connection.available("final_hidden_states")),
        "router_logits": "all" if connection.available("router_logits") else None,
        **{name: "all" if connection.available(name) else None for name in BLOCK_STREAMS},
    }
    sampling = {} if _pools(llm) else {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    if not _pools(llm):
        sampling["detokenize"] = False
    try:
        result = capture(llm, prompts(), Spec(**streams), progress=False, **sampling)
    except TapError as error:
        return {"status": "refused", "reason": f"{type(error).__name__}: {error}"}
    except Exception as error:
        traceback.print_exc()
        return {"reason": f"the engine cannot run it: {says(error)}"}
    row: dict[str, Any] = {
        "convention": result.conventions["hidden_states"],
        "num_layers": result.num_layers,
        "num_rows": result.num_rows,
        "router_layers": result.layers.get("router_logits", []),
        "engine": engine_oracles(llm, result),
        "blocks": {name: result.conventions.get(name, connection.why_not(name)) for name in BLOCK_STREAMS},
        "sums": sums(result, connection),
    }
    if reference.why_not:
        return {**row, **by_engine(row["engine"], family), "hugging_face": reference.why_not}
    try:
        errors = compare(result, reference)
    except Exception as error:
        traceback.print_exc()
        return {**row, **by_engine(row["engine"], family), "hugging_face": says(error)}
    passed = all(_worst(found) < TOLERANCE for found in errors.values())
    row |= {
        "check": "Hugging Face",
        "errors": errors,
        "agrees_until": agrees_until(result, reference),
        "error": _worst([_worst(errors[name]) for name in errors if name != "router_logits"]),
        "router_error": _worst(errors["router_logits"]) if "router_logits" in errors else None,
        "status": "pass" if passed else "wrong",
    }
    if not passed:
        streams = [name for name, found in errors.items() if _worst(found) >= TOLERANCE]
        row["reason"] = f"differs from Hugging Face in {', '.join(streams)}"
        if "router_logits" in streams:
            width = result.rows("router_logits", result.layers["router_logits"][0]).shape[-1]
            row["reason"] += f" (router_logits have {width} columns)"
    return row


def plain(llm: Any) -> None:
    """Run a prompt without capture, so that what fails without it is not laid to its charge."""
    from vllm_tap.vllm import frontend

    params = frontend.new_params(llm, {} if _pools(llm) else {"max_tokens": 2, "temperature": 0.0, "detokenize": False})
    frontend.generate(llm, prompts()[:1], [params], use_tqdm=False)


def _pools(llm: Any) -> bool:
    from vllm_tap.vllm.frontend import pools

    return pools(llm)


# ------------------------------------------------------------------------------------------------------ the comparisons


def compare(result: Any, reference: ReferenceProcess) -> dict[str, list[float]]:
    """Return the error of every stream, layer by layer, relative to the root mean square of the layer."""
    errors: dict[str, dict[int, float]] = {}
    for index, output in enumerate(result.outputs):
        sample = result[index]
        expected = reference.run(sample.token_ids.tolist())
        assert sample.positions.tolist() == list(range(len(sample)))
        if isinstance(getattr(output, "outputs", None), list):
            assert sample.token_ids.tolist() == [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]
        for stream, layers in result.layers.items():
            for layer in layers:
                if layer not in expected[stream]:
                    continue  # of what blocks add, Hugging Face's model has no module
                rows = result.rows(stream, layer, *sample._range)
                wanted = torch.from_numpy(expected[stream][layer])
                found = errors.setdefault(stream, {})
                found[layer] = max(found.get(layer, 0.0), relative(rows, wanted))
    return {stream: [float(f"{found[layer]:.2g}") for layer in sorted(found)] for stream, found in errors.items()}


def sums(result: Any, connection: Any) -> dict[int, float]:
    """Return how far the stream before each layer and what its blocks add are from the stream behind it."""
    from vllm_tap.streams import BLOCK_STREAMS

    errors: dict[int, float] = {}
    if any(connection.why_not(name) for name in BLOCK_STREAMS):
        return errors
    for layer in result.layers["hidden_states"]:
        added = [result.rows(name, layer) for name in BLOCK_STREAMS if layer in result.layers.get(name, ())]
        before = result.rows("hidden_states", layer - 1) if layer else result.rows("embeddings", 0)
        if added:
            found = before.double() + sum(rows.double() for rows in added)
            errors[layer] = float(f"{relative(found.float(), result.rows('hidden_states', layer)):.2g}")
    return errors


def agrees_until(result: Any, reference: ReferenceProcess) -> int | None:
    """Return the first position at which the longest sample differs in any layer, or None."""
    sample = result[len(result) - 1]
    expected = reference.run(sample.token_ids.tolist())["hidden_states"]
    for position in range(len(sample)):
        for layer, rows in sample.hidden_states.items():
            if relative(rows[position], torch.from_numpy(expected[layer][position])) > TOLERANCE:
                return position
    return None


def relative(rows: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the root mean square of what is expected, or `OTHER_SHAPE`."""
    if rows.shape != expected.shape:
        print(f"rows are {tuple(rows.shape)}, expected {tuple(expected.shape)}", file=sys.stderr)
        return OTHER_SHAPE
    return float((rows.float() - expected.float()).abs().max() / expected.float().square().mean().sqrt())


def _worst(errors: list[float]) -> float:
    return max((error if error == error else float("inf") for error in errors), default=0.0)


def engine_oracles(llm: Any, result: Any) -> dict[str, Any]:
    """Compare a capture with what the engine's own modules compute, without any other implementation.

    final_norm: the final norm of the last layer's rows is final_hidden_states. entry_norms: the norm with which layer
    i + 1 begins, of the rows of layer i, is what that norm returned in a forward pass, so these rows are what the next
    layer read. gates: router_logits are what the gates returned. table: embeddings are what the model looks up (models
    that scale them or add positions afterwards differ here).
    """
    found: dict[str, Any] = {}
    for name, oracle in {"final_norm": final_norm, "modules": modules, "table": table}.items():
        try:
            answer = oracle(llm, result)
        except Exception as error:
            traceback.print_exc()
            answer = says(error)
        found |= answer if isinstance(answer, dict) else {name: answer}
    return found


def flat(oracles: dict[str, Any]) -> list[float]:
    """Return the errors of the oracles that say something of the residual stream."""
    entries = oracles.get("entry_norms")
    return [oracles["final_norm"], *(entries if isinstance(entries, list) else [])]


def holds(oracles: dict[str, Any], family: Family) -> bool:
    """Tell whether the engine's own modules confirm every layer, and every gate if there are gates."""
    entries, gates = oracles.get("entry_norms"), oracles.get("gates", [])
    if not (isinstance(oracles.get("final_norm"), float) and isinstance(entries, list) and isinstance(gates, list)):
        return False
    limit = HALF_TOLERANCE if family.engine.get("dtype") == "bfloat16" else TOLERANCE
    return max(_worst(flat(oracles)), _worst(gates)) < limit


def by_engine(oracles: dict[str, Any], family: Family) -> dict[str, Any]:
    """Judge by the engine's own modules alone: the last layer by the final norm, those before it by their norms."""
    if not isinstance(oracles.get("final_norm"), float):
        return {"status": "not-run", "reason": f"nothing to compare with: {oracles.get('final_norm')}"}
    gates = oracles.get("gates")
    row = {
        "check": "the engine's norms" if holds(oracles, family) else "the engine's final norm (last layer only)",
        "error": _worst(flat(oracles)) if holds(oracles, family) else oracles["final_norm"],
        "router_error": _worst(gates) if isinstance(gates, list) and gates else None,
    }
    return {**row, "status": "pass" if row["error"] < TOLERANCE else "wrong"}


def final_norm(llm: Any, result: Any) -> float | str:
    """Return the error of the final norm's identity."""
    if "final_hidden_states" not in result.layers:
        return "no final_hidden_states"

    def identity(worker: Any) -> float:
        norm = getattr(worker, "worker", worker).vllm_tap.taps.final_norm
        assert norm is not None
        with torch.inference_mode():
            normed = norm(result.rows("hidden_states", -1).clone())
        normed = normed[0] if isinstance(normed, tuple) else normed
        return relative(normed, result.rows("final_hidden_states", -1))

    return float(f"{ask(llm, identity):.2g}")


def modules(llm: Any, result: Any) -> dict[str, Any]:
    """Return the errors of the layers' rows under the norms that read them, and of router_logits against the gates.

    One prompt is captured again, alone, with hooks of our own. alone: how far its rows are from those of the first
    capture, in which it shared its steps; more than rounding means that the engine does not repeat itself.
    """
    from vllm_tap import Spec, capture

    prompt = result.outputs[-1].prompt_token_ids
    seen: dict[tuple[str, int], torch.Tensor] = {}
    norms: dict[int, Any] = {}
    gates: dict[int, Any] = {}
    handles: list[Any] = []

    def keep_input(index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            rows = args[0] if args else kwargs["hidden_states"]
            seen.setdefault(("gate", index), rows.reshape(-1, rows.shape[-1])[: len(prompt)].clone())

        return hook

    def keep(kind: str, index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            rows = output[0] if isinstance(output, tuple) else output
            seen.setdefault((kind, index), rows.reshape(-1, rows.shape[-1])[: len(prompt)].clone())

        return hook

    def watch(worker: Any) -> None:
        for index, layer in getattr(worker, "worker", worker).vllm_tap.taps.layers.items():
            children = dict(layer.named_children())
            norm = next((children[name] for name in ENTRY_NORMS if name in children), None)
            if norm is not None and index:
                norms[index] = norm
                handles.append(norm.register_forward_hook(keep("norm", index)))
            if index in result.layers.get("router_logits", ()):
                for block, gate in _gates(layer, result.router_width):
                    gates[index] = gate
                    handles.append(block.register_forward_pre_hook(keep_input(index), with_kwargs=True))

    result.router_width = (
        result.rows("router_logits", result.layers["router_logits"][0]).shape[-1]
        if ("router_logits" in result.layers)
        else 0
    )
    ask(llm, watch)
    try:
        sampling = {} if _pools(llm) else {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
        spec = Spec(hidden_states="all", router_logits="all" if result.router_width else None)
        again = capture(llm, [{"prompt_token_ids": prompt}], spec, progress=False, **sampling)
    finally:
        for handle in handles:
            handle.remove()
    sample, first = again[0], result[len(result) - 1]
    alone = [relative(rows, first.hidden_states[layer][: len(prompt)]) for layer, rows in sample.hidden_states.items()]
    errors: dict[str, list[float]] = {"norm": [], "gate": []}
    with torch.inference_mode():
        for (kind, index), output in sorted(seen.items()):
            if kind == "norm":
                rows = norms[index].forward(sample.hidden_states[index - 1][: len(prompt)].clone())
                rows = (rows[0] if isinstance(rows, tuple) else rows).reshape(output.shape)
            else:
                rows = sample.router_logits[index][: len(prompt)]
                output = gates[index].forward(output)
                output = output[0] if isinstance(output, tuple) else output
            errors[kind].append(float(f"{relative(rows, output):.2g}"))
    return {
        "alone": float(f"{_worst(alone):.2g}"),
        "entry_norms": errors["norm"] or "the layers have no entry norm by a known name",
        **({"gates": errors["gate"] or "no block with a gate was found"} if result.router_width else {}),
    }


def _gates(layer: Any, num_experts: int) -> list[tuple[Any, Any]]:
    """Return the block of experts of a layer and its gate: the child that gives a number per expert."""
    return [
        (block, child)
        for block in layer.modules()
        for child_name, child in block.named_children()
        if child_name in ("gate", "router") and getattr(child, "output_size", 0) == num_experts
    ][:1]


def table(llm: Any, result: Any) -> float:
    """Return the error of the embeddings against what the model looks up."""

    def look_up(worker: Any) -> torch.Tensor:
        model = getattr(worker, "worker", worker).model_runner.get_model()
        function = getattr(model, "embed_input_ids", None) or model.get_input_embeddings
        with torch.inference_mode():
            return function(torch.from_numpy(result.sequences.token_ids.astype("int64"))).clone()

    return float(f"{relative(result.rows('embeddings', 0), ask(llm, look_up)):.2g}")


if __name__ == "__main__":
    assert VOCAB_SIZE > 250
    print(json.dumps(main(sys.argv[1])), flush=True)
    # Nothing of an engine in this process is worth an orderly end.
    os._exit(0)
