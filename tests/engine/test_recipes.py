"""Recipes of docs/recipes.md run, and what they make agrees with Hugging Face.

Runs in the test process, beside one eager model with experts.
"""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.engines import Engine, References, greedy, prompts
from vllm_tap import Spec, capture
from vllm_tap.interchange import replay

pytestmark = pytest.mark.engine

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
FAMILY = "qwen3_moe"
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
LETTERS = [f"{word} is a word" for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")]
DIGITS = [f"{number * 37} {number * 91}" for number in range(1, 9)]


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    """An engine that generates."""
    engine = Engine(tiny_model(FAMILY), enforce_eager=True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Any:
    """The same model in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model(FAMILY), dtype=torch.float32).eval()


def recipe(name: str) -> dict[str, Any]:
    """Return what a recipe defines."""
    return runpy.run_path(str(RECIPES / f"{name}.py"))


def test_every_recipe_has_a_test_and_a_place_in_the_page() -> None:
    """None is left behind when another is added."""
    page = (RECIPES.parents[1] / "docs" / "recipes.md").read_text()
    here = Path(__file__).read_text()
    for path in RECIPES.glob("*.py"):
        assert f"examples/recipes/{path.name}" in page
        assert f'recipe("{path.stem}")' in here


def test_a_probe_tells_texts_apart(engine: Engine) -> None:
    """By prompts that it was not trained on."""
    assert recipe("probe")["run"](engine.llm, LETTERS, DIGITS, 2) > 0.7


def test_a_direction_is_the_difference_of_means_and_moves_a_model(engine: Engine, model: Any) -> None:
    """What goes into the next layer moves by it, and by nothing when the block has ended."""
    steering = recipe("steering")
    vector = steering["direction"](engine.llm, LETTERS, DIGITS, 1)
    spec = Spec(hidden_states=[1], positions="last")
    means = [
        capture(engine.llm, texts, spec, progress=False, max_tokens=1, temperature=0).rows("hidden_states", 1).mean(0)
        for texts in (LETTERS, DIGITS)
    ]
    torch.testing.assert_close(vector, means[0] - means[1])
    ids = torch.tensor([prompts((5,))[0]["prompt_token_ids"]])
    seen: list[torch.Tensor] = []
    hook = model.model.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
        with steering["steered"](model, 1, vector):
            model(ids)
        model(ids)
    hook.remove()
    before, during, after = seen
    torch.testing.assert_close(during - before, vector.expand_as(before), rtol=1e-4, atol=1e-4)
    assert after.equal(before)


def test_an_autoencoder_learns_from_a_recording(engine: Engine, tmp_path: Path) -> None:
    """Its error falls to less than half."""
    errors = recipe("sae")["run"](engine.llm, LETTERS + DIGITS, 2, tmp_path / "run")
    assert sum(errors[-10:]) < sum(errors[:10]) / 2


def test_experts_are_counted_and_drawn(engine: Engine, references: Callable[[str], References], tmp_path: Path) -> None:
    """As often as Hugging Face's routers choose them, over the same sequences."""
    given = prompts((5, 33))
    counts = recipe("experts")["run"](engine.llm, given, tmp_path)
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")
    expected = torch.zeros(counts.shape, dtype=torch.long)
    for output in engine.llm.generate(given, greedy(max_tokens=8), use_tqdm=False):
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]
        for row, (ids, _) in enumerate(references(FAMILY).choices_of(tokens).values()):
            expected[row] += ids.flatten().bincount(minlength=counts.shape[1]).cpu()
    assert counts.tolist() == expected.tolist()


def test_replayed_experts_are_those_of_the_routers(engine: Engine, references: Callable[[str], References]) -> None:
    """For each token that entered the model."""
    for tokens, record in recipe("replay")["run"](engine.llm, prompts((5, 9)), **GREEDY):
        assert len(record.ids) == len(tokens)
        for layer, (ids, _) in references(FAMILY).choices_of(tokens.tolist()).items():
            assert np.sort(record.ids[:, layer]).tolist() == ids.tolist()


def test_experts_that_are_forced_upon_a_model_make_the_rows_of_the_engine(engine: Engine, model: Any) -> None:
    """Also of a model whose own routers would choose others; behind the block these do."""
    wanted = Spec(routed_experts="all", final_hidden_states=True)
    sample = capture(engine.llm, prompts((33,)), wanted, progress=False, **GREEDY)[0]
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight)
    expected = model.lm_head(sample.final_hidden_states)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return other(sample.token_ids[None].long(), use_cache=False).logits[0]

    with recipe("replay")["forced"](other, replay(sample)):
        torch.testing.assert_close(logits(), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(), expected, rtol=1e-3, atol=1e-3)


def test_the_lens_ends_with_the_token_that_is_generated(engine: Engine, model: Any) -> None:
    """The last layer's rows, normed, make the logits."""
    given = prompts((9,))
    seen = recipe("lens")["run"](engine.llm, given[0], model)
    assert seen[-1] == engine.generate(given, max_tokens=1, temperature=0)[0][-1]


def test_a_monitor_sees_rows_while_tokens_come_and_ends_a_generation(engine: Engine) -> None:
    """Products are those of the whole generation's rows, up to the one that passes the limit."""
    monitor, given, spec = recipe("monitor"), prompts((5,))[0], Spec(hidden_states=[2], positions="generated")
    rows = capture(engine.llm, [given], spec, progress=False, **GREEDY)[0].hidden_states[2]
    vector = rows[3] / rows[3].norm()
    products = (rows @ vector).tolist()
    all_seen = monitor["run"](engine.llm, given, 2, vector, float("inf"), **GREEDY)
    assert all_seen == pytest.approx(products, abs=1e-4)
    limit = products[0] - 1.0
    assert len(monitor["run"](engine.llm, given, 2, vector, limit, **GREEDY)) < len(products)
    assert not engine.llm.llm_engine.has_unfinished_requests()
