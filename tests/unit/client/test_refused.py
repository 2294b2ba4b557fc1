"""The prompt that vLLM refuses: told by how many it has begun to read, and how many it has taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_tap.errors import BudgetError, EngineDiedError, SpecError
from vllm_tap.vllm.frontend import _adding
from vllm_tap.vllm.refused import Handed, told, told_by_length

EngineDeadError = type("EngineDeadError", (Exception,), {})
EngineGenerateError = type("EngineGenerateError", (Exception,), {})


def add_all(prompts: Handed, bad: int, error: Exception, at_once: bool = False) -> None:
    """Read prompts and add them as vLLM does, one by one or all at once, and fail at one of them."""
    engine = SimpleNamespace(add_request=lambda *args: str(args))
    with _adding(SimpleNamespace(llm_engine=engine), prompts):
        for number, prompt in enumerate(list(prompts) if at_once else prompts):
            if number == bad:
                raise error
            engine.add_request(prompt)
        raise error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("too long"), "vLLM refuses prompt 2, or its parameters: too long"),
        (KeyError("image"), "vLLM refuses prompt 2, or its parameters: KeyError: 'image'"),
    ],
)
def test_a_prompt_is_named(error: Exception, says: str) -> None:
    """With what was said of it, and the error as the cause."""
    with pytest.raises(SpecError) as caught:
        add_all(Handed("abcd"), 2, error)
    assert (str(caught.value), caught.value.sample, caught.value.__cause__) == (says, 2, error)


@pytest.mark.parametrize(
    ("error", "bad", "at_once"),
    [
        (ValueError("somewhere"), 2, True),  # all are read before the first is added
        (ValueError("while it computes"), 9, False),
        (BudgetError("full"), 2, False),
        (EngineDeadError(), 2, False),
    ],
)
def test_what_is_of_no_prompt_comes_through(error: Exception, bad: int, at_once: bool) -> None:
    """Where it cannot be told which, and where it is none of them."""
    with pytest.raises(type(error)) as caught:
        add_all(Handed("abcd"), bad, error, at_once)
    assert caught.value is error


def test_a_prompt_alone_is_the_one() -> None:
    """Its number is known; what is said of the first of a call is said of it."""

    def failed(error: Exception, cause: Any = None) -> Exception:
        with pytest.raises((SpecError, EngineDiedError)) as caught, told(7):
            raise error from cause
        return caught.value

    assert str(failed(SpecError("prompt 0 is odd", sample=0))) == "prompt 7 is odd"
    assert str(failed(EngineGenerateError(), ValueError("odd"))) == "vLLM refuses prompt 7, or its parameters: odd"
    assert isinstance(failed(EngineDeadError()), EngineDiedError)


@pytest.mark.parametrize("bad", [[5] * 9, "a long text"])
def test_where_all_are_read_first_the_length_tells(bad: Any) -> None:
    """Of token ids, and of texts by the engine's tokenizer; another error comes through."""
    tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()))
    llm = SimpleNamespace(model_config=SimpleNamespace(max_model_len=8), get_tokenizer=lambda: tokenizer)
    long = bad if isinstance(bad, str) else {"prompt_token_ids": bad}
    given = ["short", {"prompt_token_ids": [5] * 8}, long]
    with pytest.raises(SpecError, match=r"refuses prompt 2, .*: of 8") as caught, told_by_length(llm, given):
        raise ValueError("of 8")
    assert caught.value.sample == 2
    with pytest.raises(KeyError), told_by_length(llm, ["short"]):
        raise KeyError("other")
