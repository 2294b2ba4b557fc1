"""Random prompts, parameters and Specs, drawn from one seed; runs in the test process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from vllm_tap import Positions, Spec
from vllm_tap.spec import DTYPES, NAMED_POSITIONS, REDUCTIONS

MAX_MODEL_LEN = 384
BLOCK_SIZE = 32
NUM_LAYERS = 4
LAYERED = ("hidden_states", "attention_output", "mlp_output")
EVERYTHING = Spec(**dict.fromkeys(LAYERED, "all"))
FIRST_ID, LAST_ID = 3, 250
"""Prompts are made of these tokens, none of them special."""

LENGTHS = (1, 2, 7, 31, 32, 33, 64, 120, 200)
LIMITS = {"v1": (1, 2, 9, 40, 90), "v2": (1, 2, 9, 40)}
"""Values of max_tokens by runner. An interpreted step of the V2 runner takes a tenth of a second for each of its
requests, so there most rows are those of prompts."""


class Draws:
    """Random things that captures are made of.

    Args:
        seed: All follows from it.
        limits: Values of max_tokens.
        reach: Positions that are named lie so far from an end at most.
    """

    def __init__(self, seed: int, limits: Sequence[int], reach: int = 40) -> None:
        self.random, self.limits, self.reach = random.Random(seed), limits, reach
        self.prefix = self.tokens(3 * BLOCK_SIZE)

    def chance(self, share: float) -> bool:
        """Return True in this share of calls."""
        return self.random.random() < share

    def one(self, *values: Any) -> Any:
        """Return one of some values."""
        return self.random.choice(values)

    def tokens(self, length: int) -> list[int]:
        """Return random tokens."""
        return [self.random.randint(FIRST_ID, LAST_ID) for _ in range(length)]

    def prompt(self) -> list[int]:
        """Return a prompt: repeated ones draw drafts, shared beginnings prefix hits, long ones are cut into chunks."""
        kind, length = self.random.random(), self.one(*LENGTHS)
        if kind < 0.02:
            return self.tokens(MAX_MODEL_LEN - 1)
        if kind < 0.3:
            return self.prefix + self.tokens(length)
        if kind < 0.6:
            unit = self.tokens(max(2, length // 6))
            return (unit * length)[:length]
        return self.tokens(length)

    def params(self, prompt_len: int, most_completions: int = 3) -> Any:
        """Return sampling parameters that end in one of several ways."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        greedy = self.chance(0.7)
        by_text = self.chance(0.1)
        return SamplingParams(
            n=1 if greedy or self.chance(0.8) else self.random.randint(1, most_completions),
            max_tokens=min(MAX_MODEL_LEN - prompt_len, self.one(*self.limits)),
            temperature=0.0 if greedy else 0.7,
            ignore_eos=self.chance(0.5),
            stop_token_ids=self.random.sample(range(512), 4),
            stop=[chr(self.random.randrange(97, 123)) for _ in range(3)] if by_text else None,
            detokenize=by_text,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def specs(self, num_samples: int, reduces: bool = True) -> Spec | list[Spec]:
        """Return what a capture asks for: often everything, else something, or something for each sample."""
        kind = self.random.random()
        if kind < 0.4:
            return EVERYTHING
        if kind < 0.65:
            return self.spec(reduces)
        some = [EVERYTHING, *(self.spec(reduces) for _ in range(self.random.randint(1, 7)))]
        return [self.one(*some) for _ in range(num_samples)]

    def spec(self, reduces: bool = True) -> Spec:
        """Return a choice of some streams, layers and positions; perhaps one row of them, or another dtype."""
        dtype = self.one(*DTYPES) if self.chance(0.25) else None
        streams = {name: self.layers() for name in LAYERED if self.chance(0.5)} or {self.one(*LAYERED): "all"}
        return Spec(
            **({"hidden_states": self.layers()} if dtype == "fp8" else streams),
            embeddings=dtype != "fp8" and self.chance(0.3),
            final_hidden_states=dtype != "fp8" and self.chance(0.3),
            positions=self.positions(),
            missing="skip",
            reduce=self.one(*REDUCTIONS) if reduces and self.chance(0.25) else None,
            dtype=dtype,
        )

    def layers(self) -> Any:
        """Return "all", or some layers."""
        return self.one("all", [0], [-1], sorted(self.random.sample(range(NUM_LAYERS), 2)))

    def positions(self) -> Any:
        """Return a name, positions of the prompt, or an expression."""
        kind = self.random.random()
        if kind < 0.5:
            return self.one("all", *NAMED_POSITIONS)
        if kind < 0.65:  # what is generated is told apart by the host alone, which is ahead where tokens are drafted
            return Positions.generated(self.random.randint(0, 3), None, self.random.randint(2, 5))
        return self.numbers() if kind < 0.72 else self.expression(self.random.randint(0, 3))

    def numbers(self) -> list[int]:
        """Return positions of a prompt, some of which it may not have."""
        return sorted({self.random.randint(-self.reach, self.reach) for _ in range(5)})

    def expression(self, depth: int) -> Positions:
        """Return an expression of so many operations within one another."""
        if depth:
            a, b = self.expression(depth - 1), self.expression(depth - 1)
            return self.one(a | b, a | b, a - b, a & b)
        leaf = self.random.randrange(5)
        if leaf < 2:
            window = self.bound(), self.bound(), self.one(None, self.random.randint(1, 7))
            return Positions.prompt(*window) if leaf else Positions.generated(*window)
        if leaf == 2:
            return Positions.tokens(self.tokens(60))
        return Positions.at(self.numbers()) if leaf == 3 else Positions.mask([self.chance(0.5) for _ in range(90)])

    def bound(self) -> int | None:
        """Return one end of a window."""
        return self.one(None, None, self.random.randint(-self.reach, self.reach))
