"""Prompts in every form in which users have them."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_tap.client.prompts import chat_of, each_prompt, read_prompts, unpacked
from vllm_tap.errors import SpecError
from vllm_tap.vllm.token_types import types_of, with_types

IDS = [5, 9, 44]
PROMPT = {"prompt_token_ids": IDS}
CHAT = [{"role": "user", "content": "Where do bees go?"}]


class Encoding(UserDict[str, Any]):
    """A mapping that is no dict of vLLM's, as a tokenizer returns."""


@pytest.mark.parametrize(
    ("given", "items"),
    [
        ("bees", ["bees"]),
        (["bees", PROMPT], ["bees", PROMPT]),
        (("bees", "sea"), ["bees", "sea"]),
        (IDS, [PROMPT]),
        (tuple(IDS), [PROMPT]),
        ([np.int64(token) for token in IDS], [PROMPT]),
        ([IDS, IDS], [PROMPT, PROMPT]),
        (np.array(IDS), [PROMPT]),
        (torch.tensor(IDS), [PROMPT]),
        (np.array([IDS, IDS], np.uint16), [PROMPT, PROMPT]),
        (torch.tensor([IDS, IDS], dtype=torch.int32), [PROMPT, PROMPT]),
        ([np.array(IDS), torch.tensor(IDS)], [PROMPT, PROMPT]),
        ({"prompt_token_ids": np.array(IDS)}, [PROMPT]),
        (Encoding(input_ids=IDS, attention_mask=[1, 1, 1]), [PROMPT]),
        (Encoding(input_ids=[[0, *IDS], [*IDS, 0]], attention_mask=[[0, 1, 1, 1], [1, 1, 1, 0]]), [PROMPT, PROMPT]),
        (Encoding(input_ids=torch.tensor([[0, *IDS]]), attention_mask=torch.tensor([[0, 1, 1, 1]])), [PROMPT]),
        ([Encoding(input_ids=IDS), Encoding(input_ids=torch.tensor([IDS]))], [PROMPT, PROMPT]),
        (
            Encoding(input_ids=[[0, *IDS]], attention_mask=[[0, 1, 1, 1]], token_type_ids=[[0, 0, 1, 1]]),
            [{**PROMPT, "token_type_ids": [0, 1, 1]}],
        ),
        (Encoding(input_ids=IDS, token_type_ids=np.array([0, 0, 1])), [{**PROMPT, "token_type_ids": [0, 0, 1]}]),
        (Encoding(input_ids=IDS, token_type_ids=[0, 0, 0], special_tokens_mask=[1, 0, 0]), [PROMPT]),
        (({"prompt": text} for text in "ab"), [{"prompt": "a"}, {"prompt": "b"}]),
        (map(str.upper, ["a", "b"]), ["A", "B"]),
        ({"encoder_prompt": "a", "decoder_prompt": None}, [{"encoder_prompt": "a", "decoder_prompt": None}]),
    ],
)
def test_what_is_taken_as_prompts(given: Any, items: list[Any]) -> None:
    """Every form becomes strings and dicts, in order."""
    assert read_prompts(given) == (items, False)


@pytest.mark.parametrize(
    ("given", "items"),
    [
        (CHAT, [CHAT]),
        ([CHAT, CHAT], [CHAT, CHAT]),
        ((chat for chat in (CHAT, CHAT)), [CHAT, CHAT]),
        ([{"messages": CHAT, "label": 1}], [CHAT]),
        (tuple(CHAT), [tuple(CHAT)]),
        ([{**CHAT[0], "content": None}], [[{**CHAT[0], "content": None}]]),
        ([*CHAT, {"role": "assistant", "tool_calls": []}], [[*CHAT, {"role": "assistant", "tool_calls": []}]]),
        ([*CHAT, {"role": "assistant", "reasoning": "a"}], [[*CHAT, {"role": "assistant", "reasoning": "a"}]]),
    ],
)
def test_what_is_taken_as_conversations(given: Any, items: list[Any]) -> None:
    """One, several, and records of a data set that have them."""
    assert read_prompts(given) == (items, True)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (5, "prompts is a int"),
        (None, "prompts is a NoneType"),
        (b"bees", "decode them"),
        ([], "is empty"),
        (iter(()), "is empty"),
        (["bees", 7], "prompt 1 is a int: pass strings"),
        (["bees", None], "prompt 1 is a NoneType"),
        (["bees", []], "prompt 1 is a list of nothing"),
        ([["bees", "sea"]], "prompt 0 is a pair of texts"),
        ([["bees"]], "prompt 0 is a list of str"),
        ([[True, False]], "prompt 0 is a list of bool"),
        (np.array([0.5, 1.5]), "prompt 0 is a float64|prompt 0 is an array of float64"),
        (torch.zeros(2, 3), r"prompt 0 is an array of torch.float32 \[3\]"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"prompt 0 is an array of torch.int64 \[2, 3\]"),
        (["bees", CHAT], "prompt 1 is a conversation, unlike"),
        ([CHAT, "bees"], "prompt 1 is no conversation, unlike"),
        ([CHAT[0], "bees"], "prompt 0 is a message alone"),
        ([{"promt": "bees"}], "prompt 0 is a dict of 'promt'. Did you mean 'prompt'"),
        ([{"prompt_token_ids": "bees"}], "prompt 0: prompt_token_ids is a str, expected whole numbers"),
        ([{"prompt_embeds": torch.zeros(2, 3)}], "rows are labelled by token ids"),
        ([{"messages": "bees"}], 'its "messages" are no list'),
        ([CHAT, [*CHAT, {"role": "user"}]], r'prompt 1: message 1 \(user\) has no "content": vLLM would read an empty'),
        (
            [{"messages": [{"role": "user", "text": "bees"}]}],
            """prompt 0: message 0 .* has no "content", but 'text':""",
        ),
        ([[*CHAT, {"role": "assistant", "name": "bee"}]], """prompt 0: message 1 .* has no "content", but 'name':"""),
        (Encoding(input_ids=[[0, 0]], attention_mask=[[0, 0]]), "no token that its attention_mask keeps"),
        (Encoding(input_ids=[[0.5]]), "expected whole numbers"),
        (Encoding(input_ids=[IDS], pixel_values=torch.zeros(1)), "has pixel_values beside its input_ids"),
    ],
)
def test_what_is_not_taken_is_a_sentence(given: Any, match: str) -> None:
    """With the number of the prompt, and what to pass."""
    with pytest.raises(SpecError, match=match) as caught:
        read_prompts(given)
    assert str(caught.value).endswith((".", "?"))


def test_a_generator_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompts are there for the engine, and for what looks at them before."""
    made: list[int] = []

    def generate() -> Any:
        for number in range(3):
            made.append(number)
            yield f"prompt {number}"

    make: Callable[[], Any] = generate
    assert len(read_prompts(make()).items) == len(made) == 3


@pytest.mark.parametrize(
    "given", [Encoding(input_ids=[IDS, IDS]), IDS, np.array(IDS), "bees", CHAT, [IDS, "bees", CHAT]]
)
def test_prompts_one_by_one_are_the_same(given: Any) -> None:
    """A prompt alone is no iterable of its parts, whichever way it is read."""
    one_by_one = list(each_prompt(given))
    if not isinstance(given, list) or given is CHAT or given is IDS:
        assert one_by_one == read_prompts(given).items
    assert list(each_prompt(unpacked(given))) == one_by_one


@pytest.mark.parametrize(
    ("prompt", "architecture", "num_types", "match"),
    [
        ({"token_type_ids": [0, 1, 1]}, "BertForSequenceClassification", 2, ""),
        ({"token_type_ids": [1, 1]}, "BertForSequenceClassification", 2, ""),
        ({"token_type_ids": [0, 0]}, "LlamaForCausalLM", 0, ""),
        ("bees", "LlamaForCausalLM", 0, ""),
        ({"token_type_ids": [0, 1, 1]}, "LlamaForCausalLM", 0, "prompt 1 has token_type_ids, and LlamaForCausalLM"),
        ({"token_type_ids": [0, 1, 1]}, "RobertaForSequenceClassification", 1, "reads none"),
        ({"token_type_ids": [0, 1, 1]}, "BertModel", 2, "reads none"),
        ({"token_type_ids": [0, 1, 0]}, "BertForSequenceClassification", 2, "zeros, then ones"),
        ({"token_type_ids": [0, 2, 2]}, "BertForSequenceClassification", 2, "zeros, then ones"),
    ],
)
def test_token_types_travel_with_the_parameters(prompt: Any, architecture: str, num_types: int, match: str) -> None:
    """To models that read them, as vLLM takes them; elsewhere they are refused, unless they say nothing."""
    llm = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture], type_vocab_size=num_types))
    )
    plain = SimpleNamespace(extra_kwargs={"mine": 1})
    if match:
        with pytest.raises(SpecError, match=match):
            with_types(llm, ["bees", prompt], [plain, plain])
        return
    first, second = with_types(llm, ["bees", prompt], [plain, plain])
    assert first is plain
    assert plain.extra_kwargs == {"mine": 1}
    types = types_of(prompt)
    carried = {"compressed_token_type_ids": types.index(1)} if any(types) else {}
    assert second.extra_kwargs == {"mine": 1, **carried}


def test_what_a_chat_template_is_given_is_for_conversations() -> None:
    """For another prompt it would be dropped without a word."""
    options = {"tools": []}
    assert chat_of([{"role": "user", "content": "a"}], options, 0) is options
    assert chat_of("a", {}, 0) is None
    with pytest.raises(SpecError, match="tools: for conversations alone, and prompt 3 is none"):
        chat_of("a", options, 3)
