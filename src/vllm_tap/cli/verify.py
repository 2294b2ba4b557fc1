"""`vllm-tap verify`: built-in prompts through a user's model, and every check that needs no answer known beforehand.

Runs in the user's process. The checks themselves are in `verifications`.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

from vllm_tap.cli import arguments, dataset_verify, verifications
from vllm_tap.cli.capture import require_plugin
from vllm_tap.cli.engine import engine
from vllm_tap.cli.interrupts import Interrupts
from vllm_tap.cli.table import columns, print_json
from vllm_tap.cli.verifications import Check
from vllm_tap.errors import CaptureError, SpecError
from vllm_tap.spec import Spec
from vllm_tap.streams import LAYERED_FIELDS, SINGLE_FIELDS, streams_of
from vllm_tap.transport import AUTO, INLINE, NETWORK, SEGMENT

PROMPT_LENGTHS: Final = (1, 5, 17, 17, 48)
SHARED_PREFIX: Final = 12
"""Tokens that two of the prompts have in common: equal tokens at equal positions must have equal embeddings."""


def add_command(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="check captures from a model",
        description="Start a model with your arguments, capture prompts of random tokens, and check what comes: "
        "labels, tokens with and without capture, repetition, ways of transport, embeddings, the final norm. "
        "Exit code 1 when anything differs.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or name of a model, or a dataset: then its checksums")
    group = parser.add_argument_group("how")
    group.add_argument(
        "--max-tokens",
        type=arguments.positive,
        default=4,
        metavar="N",
        help="tokens to generate a prompt (default 4)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts (default 0)")
    group.add_argument(
        "--reference",
        action="store_true",
        help="compare with a forward pass of transformers too, in float32 on the processor; the weights must be local",
    )
    arguments.add_json_option(parser)
    arguments.add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    if dataset_verify.is_dataset(options.model):
        return dataset_verify.run(options)
    if options.reference:
        verifications.require_reference(options.model)
    require_plugin()
    with Interrupts(keeps=False) as interrupts, engine(options, interrupts, listens=True) as llm:
        prompts = make_prompts(llm, options.max_tokens, options.seed)
        found = list(_checks(llm, prompts, options))
    return report(options.model, found, options.json)


def report(model: str, checks: Sequence[Check], as_json: bool = False) -> int:
    """Print the table of checks, or all of it as a JSON object, and return the exit code."""
    failed = [check.name for check in checks if not check.holds]
    if as_json:
        print_json(model=model, holds=not failed, checks=[check._asdict() for check in checks])
        return 1 if failed else 0
    rows = [("check", "rows", "result", "")]
    rows += [(check.name, f"{check.num_rows:,}", "ok" if check.holds else "DIFFERS", check.text) for check in checks]
    print(columns(rows, right=(1,)))
    print(
        f"captures from {model} differ: {', '.join(failed)}" if failed else f"captures from {model} are as they must be"
    )
    sys.stdout.flush()
    return 1 if failed else 0


def make_prompts(llm: Any, max_tokens: int, seed: int) -> list[dict[str, list[int]]]:
    """Return prompts of random token ids, none of them special; two of them begin alike.

    Raises:
        SpecError: The engine takes no sequence as long as a prompt and what is generated from it.
    """
    room = llm.model_config.max_model_len - max_tokens
    if room < 1:
        raise SpecError(
            f"--max-tokens {max_tokens} leaves no room for a prompt in {room + max_tokens} tokens: lower it."
        )
    chosen = random.Random(seed)
    allowed = sorted(set(range(llm.model_config.get_vocab_size())) - _special_ids(llm))
    ids = [chosen.choices(allowed, k=min(length, room)) for length in PROMPT_LENGTHS]
    ids[3][:SHARED_PREFIX] = ids[2][:SHARED_PREFIX]
    return [{"prompt_token_ids": prompt} for prompt in ids]


def _special_ids(llm: Any) -> set[int]:
    if llm.model_config.skip_tokenizer_init:
        return set()
    return set(getattr(llm.get_tokenizer(), "all_special_ids", ()))


def _spec(connection: Any) -> Spec:
    """Return a specification of everything that the model has."""
    fields = (field for field in LAYERED_FIELDS + SINGLE_FIELDS if field != "hidden_states")
    had = [field for field in fields if all(connection.available(name) for name in streams_of(field))]
    chosen: dict[str, Any] = {field: "all" if field in LAYERED_FIELDS else True for field in had}
    return Spec(hidden_states="all", **chosen)


def _checks(llm: Any, prompts: list[Any], options: argparse.Namespace) -> Iterator[Check]:
    """Capture, and yield one check after the other."""
    from vllm_tap.client.capture import capture
    from vllm_tap.client.connection import connect
    from vllm_tap.vllm import frontend

    connection = connect(llm)
    spec, pools = _spec(connection), frontend.pools(llm)
    sampling: dict[str, Any] = {} if pools else {"max_tokens": options.max_tokens, "temperature": 0, "ignore_eos": True}

    def again(**how: Any) -> Any:
        return capture(llm, prompts, spec, progress=False, **how, **sampling)

    def plain() -> list[list[int]]:
        params = [frontend.new_params(llm, {**sampling, "skip_reading_prefix_cache": True}) for _ in prompts]
        return verifications.generated(frontend.generate(llm, prompts, params, use_tqdm=False))

    before = [] if pools else plain()
    try:
        first = again()
    except CaptureError as error:
        yield Check("labels", 0, False, str(error))
        return
    yield verifications.labels(first, prompts)
    yield verifications.finite(first)
    if not pools:
        yield verifications.tokens(first, before, plain)
    repeated = again()
    noise = verifications.difference(first, repeated)
    yield verifications.repetition(first, noise)
    for name, how in _ways(connection).items():
        yield verifications.way(name, first, again(**how), noise)
    if "embeddings" in first.layers:
        yield verifications.embeddings(first)
    if "final_hidden_states" in first.layers:
        yield verifications.final_norm(first)
    if options.reference:
        yield verifications.reference(first, options.model)


def _ways(connection: Any) -> dict[str, dict[str, str]]:
    """Return the arguments of `capture` for each way that rows can take in this engine."""
    names = [INLINE]
    if connection.choose_transport(AUTO):
        names.append(SEGMENT)
    if len(connection.network_addresses) == len(connection.hellos):
        names.append(NETWORK)
    ways = {f"transport {name}": {"transport": name} for name in names}
    if any(hello.device == "cuda" for hello in connection.hellos):
        ways |= {f"staging {name}": {"staging": name} for name in ("staged", "direct")}
    return ways
