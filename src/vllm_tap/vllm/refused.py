"""Prompts that vLLM refuses: their numbers, and its own words. Client process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from vllm_tap.errors import EngineDiedError, SpecError, TapError, counted_from


class Handed(list[Any]):
    """Prompts of a call that count how many of them vLLM has begun to read, and how many it has taken.

    vLLM reads and adds them one by one. If it has begun one more than it has taken, it is this one that it refuses.
    """

    num_begun = num_taken = 0

    def __iter__(self) -> Iterator[Any]:
        for self.num_begun, prompt in enumerate(super().__iter__(), 1):
            yield prompt

    @property
    def at(self) -> int | None:
        """Number of the prompt that is being added; None if that cannot be told."""
        return self.num_taken if self.num_begun == self.num_taken + 1 else None


@contextmanager
def told_in(prompts: Handed) -> Iterator[None]:
    """Name the prompt in what vLLM raises while it adds the prompts of a call.

    Raises:
        SpecError: vLLM refuses a prompt. Its error is the cause.
    """
    try:
        yield
    except Exception as error:
        if prompts.at is None or is_own(error):
            raise
        raise refusal(prompts.at, error) from error


@contextmanager
def told_by_length(llm: Any, prompts: Sequence[Any]) -> Iterator[None]:
    """Name the prompt that is too long, where vLLM reads all prompts before it adds any.

    Raises:
        SpecError: There is one, and something was raised.
    """
    try:
        yield
    except Exception as error:
        longest = int(llm.model_config.max_model_len)
        lengths = () if is_own(error) else (_num_tokens(llm, prompt) for prompt in prompts)
        sample = next((number for number, length in enumerate(lengths) if length > longest), None)
        if sample is None:
            raise
        raise refusal(sample, error) from error


def _num_tokens(llm: Any, prompt: Any) -> int:
    """Return the number of tokens of a prompt, or a lower bound."""
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
    text = prompt if isinstance(prompt, str) else prompt.get("prompt")
    if ids is None and isinstance(text, str):
        ids = llm.get_tokenizer().encode(text)
    return len(ids or ())


@contextmanager
def told(sample: int) -> Iterator[None]:
    """Name the prompt in what is raised while it alone is added.

    Raises:
        SpecError: It is refused.
        EngineDiedError: The engine core has ended.
    """
    try:
        with counted_from(sample):
            yield
    except TapError:
        raise
    except Exception as error:
        if is_death(error):
            raise EngineDiedError("the engine died. See its log, and start a new one.") from error
        raise refusal(sample, error) from error


def refusal(sample: int, error: Exception) -> SpecError:
    """Return what to raise for a prompt that vLLM refuses."""
    # An unforeseen error comes in one without words.
    while type(error).__name__ == "EngineGenerateError" and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if type(error).__module__.partition(".")[0] == "vllm":
        words = Exception.__str__(error)  # its own would repeat the numbers
    else:
        words = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return SpecError(f"vLLM refuses prompt {sample}, or its parameters: {words}", sample=sample)


def is_own(error: Exception) -> bool:
    """Tell whether an error is none of a prompt: one of this package, or the end of the engine."""
    return isinstance(error, TapError) or is_death(error)


def is_death(error: Exception) -> bool:
    """Tell whether an error is vLLM's for an engine core that has ended."""
    return type(error).__name__ == "EngineDeadError"
