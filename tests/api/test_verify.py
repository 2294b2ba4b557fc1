"""`vllm-tap verify` without an engine: its options, and that each check fails where it must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_tap.cli import main, verifications, verify
from vllm_tap.cli.verifications import Check, Difference
from vllm_tap.vllm import launch

NUM_LAYERS, WIDTH = 3, 16
LENGTHS = (4, 30)
SAME = Difference(0.0, "")


class Fake:
    """A capture of two samples whose rows are known: a stream that layers add to, and its RMS norm."""

    def __init__(self, ids: torch.Tensor, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(8, WIDTH, generator=generator)
        self.ids = ids
        self.states = {("embeddings", 0): table[ids]}
        state = table[ids]
        for layer in range(NUM_LAYERS):
            state = state + torch.randn(len(ids), WIDTH, generator=generator)
            self.states["hidden_states", layer] = state
        weight, shift = torch.rand(WIDTH, generator=generator) + 0.5, torch.randn(WIDTH, generator=generator)
        normed = state / state.square().mean(-1, keepdim=True).sqrt()
        self.states["final_hidden_states", NUM_LAYERS - 1] = normed * weight + shift
        self.layers = {"embeddings": [0], "final_hidden_states": [NUM_LAYERS - 1]}
        self.layers["hidden_states"] = list(range(NUM_LAYERS))
        self.num_layers, self.num_rows = NUM_LAYERS, len(ids)
        self.conventions = {"hidden_states": "hidden"}
        self.sequences = SimpleNamespace(token_ids=ids.numpy(), starts=np.array([0, LENGTHS[0], sum(LENGTHS)]))
        self.outputs = [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1, 2])]) for _ in LENGTHS]

    def rows(self, stream: str, layer: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows as `Capture.rows` does."""
        return self.states[stream, layer % NUM_LAYERS][start:stop]

    def __iter__(self) -> Any:
        for start, length in zip(self.sequences.starts, LENGTHS, strict=False):
            yield SampleOf(self.ids[start : start + length])


class SampleOf:
    """The labels of one sample."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.token_ids, self.positions = ids, torch.arange(len(ids))

    def __len__(self) -> int:
        return len(self.token_ids)


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids of both samples; few different ones, so that tokens repeat."""
    return torch.randint(0, 8, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


# ------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["verify"], "required: MODEL"),
        (["verify", "m", "--max-tokens", "0"], "from 1 on, got '0'"),
        (["verify", "m", "--seed", "x"], "invalid int value: 'x'"),
        (["verify", "m", "--prompts", "p.txt"], "unrecognized arguments"),
        (["verify", "m", "--engine", "[1]"], "expected a JSON object"),
    ],
)
def test_wrong_usage_is_explained(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    """A wrong option ends with code 2 and a line that shows what was given."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_reference_without_weights_starts_no_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--reference` needs a local folder, and says so before an engine starts."""
    monkeypatch.setattr(launch, "start", lambda *_, **__: pytest.fail("an engine was started"))
    assert main(["verify", str(tmp_path), "--reference"]) == 1
    err = capsys.readouterr().err
    assert "not a folder with a config.json" in err
    assert err.count("\n") == 1


def test_prompts_are_the_same_for_a_seed_and_fit_the_engine() -> None:
    """Prompts repeat for a seed, hold no special token, leave room for what is generated, and two begin alike."""
    config = SimpleNamespace(max_model_len=40, get_vocab_size=lambda: 100, skip_tokenizer_init=False)
    llm = SimpleNamespace(model_config=config, get_tokenizer=lambda: SimpleNamespace(all_special_ids=[3, 7]))
    made = [prompt["prompt_token_ids"] for prompt in verify.make_prompts(llm, 4, seed=1)]
    again, other = (verify.make_prompts(llm, 4, seed=seed) for seed in (1, 2))
    assert made == [prompt["prompt_token_ids"] for prompt in again]
    assert made != [prompt["prompt_token_ids"] for prompt in other]
    assert max(map(len, made)) == 36
    assert not {3, 7} & {token for prompt in made for token in prompt}
    assert made[2][: verify.SHARED_PREFIX] == made[3][: verify.SHARED_PREFIX]


def test_a_check_that_fails_gives_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with 1 as soon as one check fails, and names it."""
    good, bad = Check("labels", 5, True, "fine"), Check("final norm", 5, False, "off")
    assert verify.report("m", [good]) == 0
    assert verify.report("m", [good, bad]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS" in out
    assert "captures from m differ: final norm" in out


@pytest.mark.parametrize(
    ("chosen", "addresses", "ways"),
    [
        ("auto", ["tcp://127.0.0.1:1"], ["transport inline", "transport segment", "transport tcp"]),
        ("auto", [], ["transport inline", "transport segment"]),
        ("", [], ["transport inline"]),
    ],
)
def test_every_transport_that_the_engine_has_is_a_way(chosen: str, addresses: list[str], ways: list[str]) -> None:
    """Shared memory where it can be mapped, a network where all workers listen, and calls in any case."""
    connection = SimpleNamespace(
        choose_transport=lambda _: chosen, network_addresses=addresses, hellos=[SimpleNamespace(device="cpu")]
    )
    assert list(verify._ways(connection)) == ways


# ------------------------------------------------------------------------------------------------------------- checks


def test_a_capture_that_is_right_holds(ids: torch.Tensor) -> None:
    """Rows that are what they must be pass every check."""
    right = Fake(ids)
    prompts = [{"prompt_token_ids": part.tolist()} for part in ids.split(LENGTHS)]
    same = verifications.difference(right, Fake(ids))
    for check in (
        verifications.labels(right, prompts),
        verifications.finite(right),
        verifications.repetition(right, same),
        verifications.way("inline", right, Fake(ids), same),
        verifications.embeddings(right),
        verifications.final_norm(right),
    ):
        assert check.holds, check


def _other_layer(fake: Fake) -> None:
    fake.states["hidden_states", NUM_LAYERS - 1] = fake.states["hidden_states", NUM_LAYERS - 2]


def _delta_only(fake: Fake) -> None:
    states = fake.states
    states["hidden_states", NUM_LAYERS - 1] = states["hidden_states", NUM_LAYERS - 1] - states["hidden_states", 0]


def _shifted(fake: Fake) -> None:
    fake.states["hidden_states", NUM_LAYERS - 1] = fake.states["hidden_states", NUM_LAYERS - 1].roll(1, 0)


@pytest.mark.parametrize("spoil", [_other_layer, _delta_only, _shifted])
def test_rows_that_are_not_the_stream_fail_the_final_norm(ids: torch.Tensor, spoil: Callable[[Fake], None]) -> None:
    """Another layer's rows, a part of the sum, or rows of the neighbouring token are no norm's input."""
    fake = Fake(ids)
    spoil(fake)
    assert not verifications.final_norm(fake).holds


def test_a_layer_norm_is_recognised(ids: torch.Tensor) -> None:
    """Models with a layer norm pass too: its mean is taken out first."""
    fake = Fake(ids)
    last = fake.states["hidden_states", NUM_LAYERS - 1] + 3.0
    fake.states["hidden_states", NUM_LAYERS - 1] = last
    fake.states["final_hidden_states", NUM_LAYERS - 1] = torch.nn.functional.layer_norm(last, (WIDTH,)) * 2 + 1
    check = verifications.final_norm(fake)
    assert check.holds
    assert "layer norm" in check.text


def test_embeddings_of_equal_tokens_must_be_equal(ids: torch.Tensor) -> None:
    """One row that is not its token's fails; positions that the model adds are allowed for."""
    fake = Fake(ids)
    repeated = next(row for row in range(1, len(ids)) if ids[row] in ids[:row])
    fake.states["embeddings", 0][repeated] += 1
    assert not verifications.embeddings(fake).holds
    ids[LENGTHS[0] : 2 * LENGTHS[0]] = ids[: LENGTHS[0]]
    fake = Fake(ids)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    fake.states["embeddings", 0] += positions[:, None]
    check = verifications.embeddings(fake)
    assert check.holds
    assert "equal positions" in check.text


def test_bytes_may_differ_only_where_the_engine_does(ids: torch.Tensor) -> None:
    """Another way must give the same bytes if the engine repeats itself, and else differ no more than it does."""
    first, other = Fake(ids), Fake(ids)
    other.states["hidden_states", 1] = other.states["hidden_states", 1] * (1 + 1e-6)
    assert not verifications.way("inline", first, other, SAME).holds
    assert verifications.way("inline", first, other, Difference(1e-6, "hidden_states[1]")).holds
    other.states["hidden_states", 1] = other.states["hidden_states", 1].roll(1, 0)
    check = verifications.way("inline", first, other, Difference(1e-6, "hidden_states[1]"))
    assert not check.holds
    assert "hidden_states[1]" in check.text


def test_values_that_are_not_numbers_are_named(ids: torch.Tensor) -> None:
    """A row with a NaN in it fails, with its layer."""
    fake = Fake(ids)
    fake.states["hidden_states", 2][5, 3] = torch.nan
    check = verifications.finite(fake)
    assert not check.holds
    assert "hidden_states[2]" in check.text


def test_tokens_must_be_those_without_capture(ids: torch.Tensor) -> None:
    """Other tokens fail, unless the engine gives other tokens without capture too; that is said."""
    fake = Fake(ids)
    assert verifications.tokens(fake, [[1, 2], [1, 2]], lambda: pytest.fail("not needed")).holds
    assert not verifications.tokens(fake, [[1, 2], [1, 3]], lambda: [[1, 2], [1, 3]]).holds
    unsteady = verifications.tokens(fake, [[1, 2], [1, 3]], lambda: [[1, 2], [1, 2]])
    assert unsteady.holds
    assert "1 prompts left out" in unsteady.text


def test_labels_of_other_tokens_fail(ids: torch.Tensor) -> None:
    """Rows labelled with tokens that were not asked for fail."""
    prompts = [{"prompt_token_ids": part.tolist()} for part in ids.split(LENGTHS)]
    prompts[1]["prompt_token_ids"][2] += 1
    assert not verifications.labels(Fake(ids), prompts).holds
