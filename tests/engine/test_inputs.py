"""What `capture` takes as prompts and how it samples, against what vLLM's own calls do with the same.

Runs in the test process, beside an engine whose model has a chat template and a generation_config.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import vllm_tap
from engine.engines import Engine
from vllm_tap import Spec
from vllm_tap.errors import SpecError

pytestmark = pytest.mark.engine

SPEC = Spec(hidden_states=[0])
CHATS = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where do bees go?"}],
    [{"role": "user", "content": "The sea"}, {"role": "assistant", "content": "is"}],
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<{{ voice or 'assistant' }}>{% endif %}"
)


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine whose model says how to sample."""
    folder = tmp_path_factory.mktemp("sampling") / "model"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 1, "temperature": 0.7}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    engine = Engine(folder, enforce_eager=True)
    yield engine
    engine.close()


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def captured(engine: Engine, prompts: Any, **arguments: Any) -> Any:
    return vllm_tap.capture(engine.llm, prompts, SPEC, progress=False, **arguments)


def test_without_arguments_the_engine_samples_as_it_does_for_generate(engine):
    """By generation_config.json: top_k of 1 makes it repeatable."""
    plain = engine.llm.generate(["the sea is blue", "bees"], use_tqdm=False)
    assert tokens(captured(engine, ["the sea is blue", "bees"]).outputs) == tokens(plain)


def test_fields_that_are_given_go_over_those_of_the_model(engine):
    """One field leaves the others as they were."""
    greedy = engine.llm.generate(["the sea is blue"], use_tqdm=False)
    longer = tokens(captured(engine, ["the sea is blue"], max_tokens=5).outputs)
    assert longer == [tokens(greedy)[0][:5]]
    sampled = {tuple(tokens(captured(engine, ["bees"], top_k=0, temperature=2.0, seed=s).outputs)[0]) for s in range(3)}
    assert len(sampled) > 1


@pytest.mark.parametrize(
    "options", [{}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"voice": "bee"}}], ids=str
)
def test_conversations_go_through_the_engines_chat_template(engine, options: dict[str, Any]):
    """Rows are those of the tokens that `llm.chat` makes of them."""
    chatted = engine.llm.chat(CHATS, use_tqdm=False, **options)
    result = captured(engine, CHATS, **options)
    for sample, output, expected in zip(result, result.outputs, chatted, strict=True):
        assert output.prompt_token_ids == expected.prompt_token_ids
        assert sample.token_ids.tolist()[: len(expected.prompt_token_ids)] == expected.prompt_token_ids
    assert tokens(result.outputs) == tokens(chatted)
    one = captured(engine, CHATS[0], **options)
    assert one.outputs[0].prompt_token_ids == chatted[0].prompt_token_ids


def test_encodings_and_arrays_give_the_rows_of_their_tokens(engine):
    """A padded encoding, without what its mask leaves out."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(engine.llm.model_config.tokenizer, pad_token="</s>")
    texts = ["the sea is blue", "bees"]
    encoding = tokenizer(texts, padding=True, return_tensors="pt")
    single = [tokenizer(text)["input_ids"] for text in texts]
    for given in (encoding, [np.array(ids) for ids in single], (tokenizer(text) for text in texts)):
        assert [sample.token_ids.tolist() for sample in captured(engine, given, max_tokens=1)] == single


def test_options_of_a_chat_without_one_are_refused(engine):
    """They would be dropped."""
    with pytest.raises(SpecError, match="chat_template_kwargs: for conversations alone"):
        captured(engine, ["bees"], chat_template_kwargs={})


LONG = "The sea is blue. " * 20
BAD: dict[str, tuple[Any, Any, str]] = {
    "text": ("bees", LONG, "256 tokens"),
    "token ids": ([5, 9], [5] * 300, r"256 tokens.* 300 "),
    "unknown ids": ([5, 9], [5, 1 << 30], f"{1 << 30} is out of vocabulary"),
    "conversation": (CHATS[0], [{"role": "user", "content": LONG}], "256 tokens"),
    "image": ("bees", {"prompt": "bees", "multi_modal_data": {"image": object()}}, "multi-?modal"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_prompt_that_the_engine_refuses_is_named(engine, kind):
    """Whatever it is: its number, and what vLLM says of it, such as how long it may be. So it is by streams."""
    good, bad, says = BAD[kind]
    with pytest.raises(SpecError, match=f"(?si)vLLM refuses prompt 2, .*{says}") as caught:
        captured(engine, [good, good, bad, good])
    assert caught.value.sample == 2
    assert not engine.llm.llm_engine.has_unfinished_requests()
    with pytest.raises(SpecError, match=f"(?si)vLLM refuses prompt 1, .*{says}"):
        list(vllm_tap.Tap(engine.llm).stream([good, bad], SPEC, max_tokens=2))
    assert not engine.llm.llm_engine.has_unfinished_requests()


def test_messages_that_call_tools_need_no_content(engine):
    """As in vLLM."""
    call = {"type": "function", "id": "1", "function": {"name": "hive", "arguments": "{}"}}
    chat = [CHATS[0][1], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "three"}]
    assert captured(engine, [chat]).outputs[0].prompt_token_ids == (
        engine.llm.chat([chat], use_tqdm=False)[0].prompt_token_ids
    )
