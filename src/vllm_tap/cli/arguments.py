"""Options of the commands: their values, and those that start an engine. Runs in the user's process."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from typing import Any, Final

from vllm_tap.positions import Positions

UNITS: Final = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_NEGATIVE_LIST = re.compile(r"-\d+([,-]-?\d+)+")
_RANGE = re.compile(r"(-?\d+)-(-?\d+)")

LAYERS: Final = 'layers are "all", or numbers and ranges between commas, such as 0-8,-1'


def join_negative(argv: Iterable[str]) -> list[str]:
    """Join lists such as `-2,-1` to the option before them, which argparse would take for an option of their own."""
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and _NEGATIVE_LIST.fullmatch(word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def layers(text: str) -> str | list[int]:
    """Read `all`, or layer numbers and ranges between commas; a range has its last layer in it."""
    return text if text == "all" else [layer for part in text.split(",") for layer in _layer_range(part, text)]


def _layer_range(part: str, text: str) -> Iterable[int]:
    match = _RANGE.fullmatch(part)
    if match is None:
        return numbers(part, LAYERS, text)
    first, last = int(match[1]), int(match[2])
    if first > last or (first < 0) != (last < 0):
        raise argparse.ArgumentTypeError(f"a range of layers goes up, such as 0-8 or -4--1; got {part!r} in {text!r}")
    return range(first, last + 1)


def positions(text: str) -> str | list[int] | Positions:
    """Read a name of positions, prompt positions between commas, or an expression in JSON; `Spec` checks the name."""
    if text.isidentifier():
        return text
    if text.startswith("{"):
        try:
            return Positions.from_plain(json.loads(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}") from None
    return numbers(text, "positions are a name or whole numbers between commas, such as 0,-1")


def numbers(text: str, rule: str, whole: str | None = None) -> list[int]:
    """Read whole numbers between commas; `whole` is what they are a part of."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{rule}; got {whole if whole is not None else text!r}") from None


def size(text: str) -> int:
    """Read a number of bytes, such as 4GiB or 500MB."""
    match = _SIZE.fullmatch(text.strip())
    nbytes = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if nbytes < 1:
        units = "KB, MB, GB, KiB, MiB or GiB"
        raise argparse.ArgumentTypeError(f"a size is a number of bytes from 1 on, or one with {units}; got {text!r}")
    return nbytes


def positive(text: str) -> int:
    """Read a whole number above zero."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def engine_object(text: str) -> dict[str, Any]:
    """Read arguments of `vllm.LLM`, a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text!r}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, such as '{{\"seed\": 1}}'; got {text!r}")
    if "model" in value:
        raise argparse.ArgumentTypeError(f"the model is an argument of its own, before the options; got {text!r}")
    return value


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `engine_arguments` reads."""
    group = parser.add_argument_group("engine", "Passed on to vllm.LLM.")
    group.add_argument("--dtype", help="dtype of the model; by default what its configuration says")
    group.add_argument("--max-model-len", type=positive, metavar="N", help="most tokens of a sequence")
    group.add_argument("--tensor-parallel-size", type=positive, metavar="N", help="ranks that share the model")
    group.add_argument("--enforce-eager", action="store_true", help="neither compile nor capture graphs")
    group.add_argument(
        "--engine", type=engine_object, default={}, metavar="JSON", help="more arguments of vllm.LLM, as a JSON object"
    )


def engine_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` that were given; the named options win over `--engine`."""
    named = {name: getattr(options, name) for name in ("dtype", "max_model_len", "tensor_parallel_size")}
    given = {name: value for name, value in named.items() if value is not None}
    return {**options.engine, **given, **({"enforce_eager": True} if options.enforce_eager else {})}
