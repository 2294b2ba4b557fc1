"""Prompts in the forms in which users have them, made into those that vLLM takes. Client process."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from vllm_tap.errors import SpecError
from vllm_tap.spec import nearest

CHAT_OPTIONS: Final[tuple[str, ...]] = (
    "chat_template",
    "chat_template_content_format",
    "add_generation_prompt",
    "continue_final_message",
    "tools",
    "chat_template_kwargs",
    "mm_processor_kwargs",
)
"""Arguments of `LLM.chat` that say how conversations become text."""

TAKES: Final = (
    'strings, lists of token ids, dicts such as {"prompt_token_ids": [...]}, conversations (lists of '
    '{"role": ..., "content": ...}), or what a tokenizer returns'
)


BESIDE_TEXT: Final = ("pixel_values", "image_", "video_", "input_features", "input_values", "audio_", "inputs_embeds")
"""Beginnings of names that processors give to what is no text. The ids alone are no prompt then."""


SAYS: Final = ("content", "tool_calls", "function_call", "reasoning", "reasoning_content", "refusal", "audio", "tools")
"""Keys of a message under which something is said. vLLM reads a message without them as an empty text."""


class Prompts(NamedTuple):
    """Prompts of one kind.

    Attributes:
        items: Strings and dicts as `LLM.generate` takes them, or conversations as `LLM.chat` takes them.
        are_chats: Whether they are conversations.
    """

    items: list[Any]
    are_chats: bool


def read_prompts(given: Any) -> Prompts:
    """Return prompts as vLLM takes them.

    Args:
        given: A prompt, a conversation, an encoding of a tokenizer, an array of token ids, or any iterable of those.
            In an encoding, what its attention mask leaves out is padding and falls away; a two-dimensional array of ids
            has no padding.

    Raises:
        SpecError: There are none, or something else is among them: its number and its type.
    """
    items = list(each_prompt(given))
    if not items:
        raise SpecError("prompts is empty: there is nothing to capture.")
    chats = [is_conversation(item) for item in items]
    if any(chats) and not all(chats):
        first = chats.index(not chats[0])
        kind = "a" if chats[first] else "no"
        raise SpecError(f"prompt {first} is {kind} conversation, unlike those before it: capture one kind at a time.")
    return Prompts(items, all(chats))


def chat_of(prompt: Any, options: dict[str, Any], number: int) -> dict[str, Any] | None:
    """Return what `LLM.chat` takes beside a prompt that is a conversation; None of another one.

    Raises:
        SpecError: There is something, and the prompt is no conversation.
    """
    if is_conversation(prompt):
        return options
    if options:
        raise SpecError(f"{', '.join(options)}: for conversations alone, and prompt {number} is none.", sample=number)
    return None


def each_prompt(given: Any) -> Iterator[Any]:
    """Yield prompts as vLLM takes them, one by one; an iterable is read as it goes.

    Raises:
        SpecError: As for `read_prompts`, but for several kinds in one iterable.
    """
    for index, one in enumerate(each_given(given)):
        yield from _prompts_of(one, index)


def unpacked(given: Any) -> Iterator[Any]:
    """Yield prompts as they are given, but encodings as the prompts that they hold.

    Raises:
        SpecError: As for `each_prompt`.
    """
    for index, one in enumerate(each_given(given)):
        yield from _prompts_of(one, index) if isinstance(one, Mapping) and "input_ids" in one else [one]


def each_given(given: Any) -> Iterable[Any]:
    """Return an iterable of prompts as they are given: of the one, if it is one.

    Raises:
        SpecError: It is neither.
    """
    if isinstance(given, bytes):
        raise SpecError(f"prompts are bytes: decode them. capture takes {TAKES}.")
    if isinstance(given, str | Mapping) or is_token_ids(given) or is_conversation(given):
        return [given]
    if not isinstance(given, Iterable):
        raise SpecError(f"prompts is a {type(given).__name__}: capture takes {TAKES}, or an iterable of those.")
    return given


def is_conversation(given: Any) -> bool:
    """Tell whether something is a list of messages, each with a role."""
    is_list = isinstance(given, Sequence) and not isinstance(given, str | bytes) and len(given) > 0
    return is_list and all(isinstance(message, Mapping) and "role" in message for message in given)


def is_token_ids(given: Any) -> bool:
    """Tell whether something is one sequence of token ids: a list, a tuple, or an array or tensor of integers [T].

    Cost: 15 ns a token of a list.
    """
    if isinstance(given, list | tuple):
        kinds = set(map(type, given))
        return bool(kinds) and all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds)
    return _kind_of_array(given) == "i" and len(given.shape) == 1 and given.shape[0] > 0


def _prompts_of(one: Any, index: int) -> list[Any]:
    """Return the prompts that one element stands for: an encoding may hold several."""
    if isinstance(one, str):
        return [one]
    if is_conversation(one):
        return [_that_says_all(one, index)]
    if is_token_ids(one):
        return [{"prompt_token_ids": _plain(one)}]
    if isinstance(one, Mapping):
        return _of_mapping(one, index)
    raise SpecError(f"prompt {index} {_description(one)}: pass {TAKES}.", sample=index)


def _of_mapping(one: Mapping[str, Any], index: int) -> list[Any]:
    if "input_ids" in one:
        return _of_encoding(one, index)
    if "role" in one:
        raise SpecError(f"prompt {index} is a message alone: pass conversations, lists of messages.", sample=index)
    if one.get("prompt_embeds") is not None:
        raise SpecError(f"prompt {index} has prompt_embeds: rows are labelled by token ids. Pass prompt_token_ids.")
    if "messages" in one:
        return _of_messages(one, index)
    ids = one.get("prompt_token_ids")
    if type(ids) is list:
        return [one]  # as vLLM takes it, which looks at each: so many tokens take milliseconds
    if ids is not None and not is_token_ids(ids):
        raise SpecError(f"prompt {index}: prompt_token_ids {_description(ids)}, expected whole numbers.", sample=index)
    if ids is not None:
        return [{**one, "prompt_token_ids": _plain(ids)}]
    known = ("prompt", "encoder_prompt", "decoder_prompt", "multi_modal_data")
    if not any(name in one for name in known):
        hint = nearest(str(next(iter(one), "")), [*known, "prompt_token_ids", "messages"])
        raise SpecError(f"prompt {index} is a dict of {', '.join(map(repr, one)) or 'nothing'}.{hint}", sample=index)
    return [one]


def _of_messages(one: Mapping[str, Any], index: int) -> list[Any]:
    """Return the conversation of a record, as data sets have them."""
    if not is_conversation(one["messages"]):
        raise SpecError(f'prompt {index}: its "messages" are no list of {{"role": ..., "content": ...}}.', sample=index)
    return [_that_says_all(one["messages"], index)]


def _that_says_all(messages: Any, index: int) -> Any:
    """Return a conversation each of whose messages says something, be it an empty text."""
    fault = next(filter(None, map(silence, messages, itertools.count())), None)
    if fault is not None:
        raise SpecError(f"prompt {index}: {fault}", sample=index)
    return messages


def silence(message: Mapping[str, Any], number: int) -> str | None:
    """Return what to say of a message that says nothing; None of one that does."""
    if any(key in message for key in SAYS):
        return None
    others = [key for key in message if key != "role"]
    has = f", but {', '.join(map(repr, others))}" if others else ""
    return f'message {number} ({message["role"]}) has no "content"{has}: vLLM would read an empty text.'


def _of_encoding(encoding: Mapping[str, Any], index: int) -> list[Any]:
    """Return the sequences of what a tokenizer returned, without padding."""
    lost = [name for name in encoding if name.startswith(BESIDE_TEXT)]
    if lost:
        raise SpecError(
            f"prompt {index} has {lost[0]} beside its input_ids, which vLLM makes itself: pass the text and the data, "
            '{"prompt": ..., "multi_modal_data": {...}}.',
            sample=index,
        )
    is_one = is_token_ids(encoding["input_ids"])
    rows, masks, types = ([given] if is_one and given is not None else given for given in _fields(encoding))
    found = []
    for number, ids in enumerate(rows):
        if not is_token_ids(ids):
            raise SpecError(f"prompt {index}: input_ids[{number}] {_description(ids)}, expected whole numbers.")
        keeps = None if masks is None else _plain(masks[number])
        prompt = {"prompt_token_ids": _kept(ids, keeps)}
        if not prompt["prompt_token_ids"]:
            raise SpecError(f"prompt {index}: input_ids[{number}] has no token that its attention_mask keeps.")
        if types is not None and any(kept := _kept(types[number], keeps)):
            prompt["token_type_ids"] = kept
        found.append(prompt)
    return found


def _fields(encoding: Mapping[str, Any]) -> list[Any]:
    return [encoding.get(name) for name in ("input_ids", "attention_mask", "token_type_ids")]


def _kept(given: Any, keeps: list[int] | None) -> list[int]:
    """Return numbers of a sequence, one for each token, as plain integers: of the tokens that its mask keeps."""
    plain = _plain(given)
    return plain if keeps is None else [one for one, is_there in zip(plain, keeps, strict=True) if is_there]


def _plain(ids: Any) -> list[int]:
    """Return token ids as vLLM takes them: the same list if it is one of plain integers."""
    if type(ids) is list and set(map(type, ids)) == {int}:
        return ids
    return [int(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)]


def _kind_of_array(given: Any) -> str:
    """Return "i" for arrays and tensors of integers, another letter for others, nothing for what is no array."""
    dtype = getattr(given, "dtype", None)
    if dtype is None or not hasattr(given, "shape"):
        return ""
    name = str(dtype).removeprefix("torch.")
    return "i" if name.startswith(("int", "uint")) else name[0]


def _description(given: Any) -> str:
    if _kind_of_array(given):
        return f"is an array of {given.dtype} {list(given.shape)}"
    if isinstance(given, list | tuple):
        kinds = sorted({type(item).__name__ for item in given})
        if kinds == ["str"] and len(given) == 2:
            return "is a pair of texts, as LLM.score takes them (pass the one text, or the ids, that the model reads)"
        return f"is a {type(given).__name__} of {', '.join(kinds) or 'nothing'}"
    return f"is a {type(given).__name__}"
