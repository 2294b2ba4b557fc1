"""Prompt files: text with a prompt a line, or JSON lines. Runs in the user's process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from vllm_tap.client.prompts import silence
from vllm_tap.errors import SpecError
from vllm_tap.spec import MAX_NUMBER

KEYS: Final = ("prompt", "messages", "token_ids", "prompt_token_ids")
"""Keys of which the object of a line has one; the last two are the same."""

Prompt = str | dict[str, Any] | list[dict[str, Any]]
"""A text, token ids, or a conversation, as `capture` takes them."""


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts of a file, in the order of its lines; empty lines are left out.

    Raises:
        SpecError: The file cannot be read, is neither .txt nor .jsonl, has no prompt, a line is not one, or only some
            of them are conversations.
    """
    readers: dict[str, Callable[[str, str], Prompt]] = {".txt": lambda line, _: line, ".jsonl": _from_json}
    if path.suffix not in readers:
        raise SpecError(f"{path}: prompts are read from .txt (one a line) or .jsonl, not from {path.suffix!r}.")
    read = readers[path.suffix]
    lines = enumerate(_text(path).split("\n"), 1)
    found: list[Prompt] = []
    for number, line in lines:
        if line.strip():
            found.append(read(line.rstrip("\r"), place := f"{path}, line {number}"))
            _require_alike(found[-1], found[0], place)
    if not found:
        raise SpecError(f"{path} has no prompt in it: write one a line.", path=str(path))
    return found


def _require_alike(prompt: Prompt, first: Prompt, place: str) -> None:
    if isinstance(prompt, list) != isinstance(first, list):
        this, those = (
            ("a conversation", "prompts") if isinstance(prompt, list) else ("no conversation", "conversations")
        )
        raise SpecError(f"{place}: {this}, and the lines before are {those}: put each kind into a file of its own.")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SpecError(
            f"{path} cannot be read ({error.strerror or error}): name a file with --prompts, .txt with a prompt a line "
            "or .jsonl.",
            path=str(path),
        ) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SpecError(f"{path}, line {line}: not UTF-8 text: save the file as UTF-8.", path=str(path)) from error


def _from_json(line: str, place: str) -> Prompt:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise SpecError(f"{place}: not JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise SpecError(f'{place}: expected an object such as {{"prompt": "..."}}, got {type(fields).__name__}.')
    chosen = [key for key in KEYS if key in fields]
    if len(chosen) != 1:
        have = " and ".join(f'"{key}"' for key in chosen) or f"none, but {sorted(fields)}"
        raise SpecError(f'{place}: an object has one of "prompt", "messages" and "token_ids", this one has {have}.')
    return _checked(chosen[0], fields[chosen[0]], place)


def _checked(key: str, value: Any, place: str) -> Prompt:
    if key == "prompt":
        if not isinstance(value, str) or not value:
            raise SpecError(f'{place}: "prompt" is a text that is not empty, got {value!r}.')
        return value
    if key == "messages":
        return _conversation(value, place)
    is_list = isinstance(value, list) and value
    if not is_list or not all(type(token) is int and 0 <= token <= MAX_NUMBER for token in value):
        raise SpecError(f'{place}: "{key}" is a list of token ids that is not empty.')
    return {"prompt_token_ids": value}


def _conversation(messages: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise SpecError(f'{place}: "messages" is a list of messages that is not empty.')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise SpecError(
                f'{place}: message {number} has no "role": write {{"role": "user", "content": "..."}} for each message.'
            )
        if fault := silence(message, number):
            raise SpecError(f"{place}: {fault}")
    return messages
