"""What a specification chooses, and how requests end, against Hugging Face, on one eager Llama with a prefix cache.

Runs in the test process, beside the engine.
"""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import vllm_tap
from engine.engines import (
    MAX_MODEL_LEN,
    PROMPT_LENGTHS,
    Engine,
    References,
    Shelf,
    compare,
    greedy,
    prompts,
    sequence,
)
from shadow import chosen
from vllm_tap import Positions, Spec
from vllm_tap.client.sequences import Sequences, TokenArrays
from vllm_tap.errors import LayerError, RowsMissingError, SpecError
from vllm_tap.vllm.frontend import STEPS_BETWEEN

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

BLOCK_SIZE = 32  # the granule of the prefix cache
HIDDEN = Spec(hidden_states="all")


@pytest.fixture(scope="module")
def shelf(tiny_model: Callable[..., Path]) -> Iterator[Shelf]:
    """The engine of this module; a test that ends it leaves the next one to start another."""
    shelf = Shelf(
        lambda: Engine(tiny_model("llama"), enforce_eager=True, enable_prefix_caching=True, block_size=BLOCK_SIZE)
    )
    yield shelf
    shelf.close()


@pytest.fixture
def engine(shelf: Shelf) -> Engine:
    """A running engine."""
    return shelf.get()


@pytest.fixture
def known(references: Callable[[str], References]) -> References:
    """Hugging Face's forward passes of the engine's model."""
    return references("llama")


def test_the_quickstart_runs(engine, monkeypatch, capsys):
    """examples/quickstart.py, which the README shows, but for its model; its first prompt tokens get their rows."""
    asked = []
    monkeypatch.setattr("vllm.LLM", lambda model: asked.append(model) or engine.llm)
    path = Path(__file__).parents[2] / "examples" / "quickstart.py"
    ran = runpy.run_path(str(path), run_name="__main__")
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    sample, (output,) = ran["sample"], ran["result"].outputs
    assert sample.token_ids.tolist() == [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]
    printed = capsys.readouterr().out
    assert f"{sample.positions}\n{sample.token_ids}\n" in printed
    assert f"{len(sample.hidden_states)} {sample.hidden_states[-1].shape} {engine.llm.model_config.dtype}" in printed


@pytest.mark.parametrize(
    ("layers", "numbers"), [([0, 2], [0, 2]), ([-1], [3]), ([-4, 3, 0, -1], [0, 3]), (range(1, 3), [1, 2])]
)
def test_layers_are_those_that_were_named(engine, known, layers, numbers):
    """A subset of layers arrives, counted from either end, and no other layer can be read."""
    result = engine.capture(prompts(), Spec(hidden_states=layers))
    compare(result, known)
    assert result.layers == {"hidden_states": numbers}
    assert result[0].hidden_states[-4 + numbers[0]].equal(result[0].hidden_states[numbers[0]])
    absent = min(set(range(4)) - set(numbers))
    with pytest.raises(LayerError, match=rf"layer {absent} was not captured.*{numbers[0]}"):
        result[0].hidden_states[absent]


def prompt_positions(prompt_len: int, num_rows: int) -> list[int]:
    """Positions of the prompt."""
    return list(range(prompt_len))


def generated_positions(prompt_len: int, num_rows: int) -> list[int]:
    """Positions of the generated tokens that entered the model."""
    return list(range(prompt_len, num_rows))


def last_position(prompt_len: int, num_rows: int) -> list[int]:
    """The last position of the prompt."""
    return [prompt_len - 1]


def last_generated_position(prompt_len: int, num_rows: int) -> list[int]:
    """The last generated token that entered the model."""
    return [num_rows - 1]


def listed_positions(prompt_len: int, num_rows: int) -> list[int]:
    """Positions 0, 5, 70 and the last two, where the prompt has them."""
    return sorted({p for p in (0, 5, 70, prompt_len - 1, prompt_len - 2) if 0 <= p < prompt_len})


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("prompt", prompt_positions),
        ("generated", generated_positions),
        ("last", last_position),
        ("last_prompt", last_position),
        ("last_generated", last_generated_position),
        ([-1, 0, 5, 70, -2], listed_positions),
    ],
)
def test_positions_are_those_that_were_named(engine, known, positions, expected):
    """Rows of the named positions arrive, and of no others, whichever step and chunk they fall into."""
    spec = Spec(hidden_states=[0, 3], embeddings=True, positions=positions, missing="skip")
    result = engine.capture(prompts(), spec)
    compare(result, known, expected)
    if isinstance(positions, str) and positions.startswith("last"):
        assert [len(sample) for sample in result] == [1] * len(PROMPT_LENGTHS)


EXPRESSIONS = [
    Positions.prompt(-8) | Positions.generated(step=3),
    Positions.prompt(2, -1, 7) - Positions.at([9, 16]),
    Positions.tokens(range(0, 256, 2)) & (Positions.prompt(5) | Positions.generated()),
    Positions.generated(-2) | Positions.mask([True, False, False, True]),
    Positions.generated(0, -1) - Positions.tokens(range(100)),
]


@pytest.mark.parametrize(
    ("positions", "transport"), [(EXPRESSIONS[0], "inline"), *((each, "segment") for each in EXPRESSIONS)]
)
def test_an_expression_takes_what_would_be_selected_afterwards(engine, known, positions, transport):
    """Chunked prompts in one batch with others, two completions each: the rows that are chosen of everything."""
    params = greedy(n=2, temperature=1.0)
    lengths = PROMPT_LENGTHS if transport == "segment" else PROMPT_LENGTHS[:2]
    spec = Spec(hidden_states=[0, 3], positions=positions)
    result = engine.capture(prompts(lengths), spec, sampling_params=params, transport=transport)
    assert Spec.from_json(spec.to_json()) == spec
    for completion in range(2):
        at = {}
        for output in result.outputs:
            num_prompt = len(output.prompt_token_ids)
            at[num_prompt] = chosen(positions, num_prompt, sequence(output, completion))
        compare(result, known, lambda prompt_len, num_rows, at=at: at[prompt_len], completion)


def test_an_expression_that_finds_nothing_gives_no_rows(engine):
    """As a slice does; workers wrote what cannot be told from what was meant."""
    spec = Spec(hidden_states=[1], positions=Positions.prompt(100) | Positions.tokens([0]))
    result = engine.capture([[5, 6, 7], [5, 0, 7]], spec)
    assert [sample.positions.tolist() for sample in result][1] == [1]
    assert result[0].hidden_states[1].shape[1] == 128


def test_completions_of_one_prompt_have_their_own_rows(engine, known):
    """With n=2 both completions carry the rows of their own tokens; a third does not exist."""
    params = greedy(n=2, temperature=1.0)  # a seed per request ends vLLM 0.32 on the CPU when prompts are chunked
    result = engine.capture(prompts([5, 40]), HIDDEN, sampling_params=params)
    for completion in range(2):
        compare(result, known, completion=completion)
    one, other = (list(output.token_ids) for output in result.outputs[0].outputs)
    assert one != other
    with pytest.raises(RowsMissingError, match="no completion 2"):
        result.sample(0, completion=2)


def test_a_stop_token_ends_the_rows(engine, known):
    """A request that stops early has the rows of what it generated until then."""
    given = prompts([12, 80])
    plain = engine.generate(given)
    result = engine.capture(given, HIDDEN, ignore_eos=False, stop_token_ids=[plain[0][3]])
    compare(result, known)
    generated = list(result.outputs[0].outputs[0].token_ids)
    assert generated == plain[0][: plain[0].index(plain[0][3]) + 1]
    assert len(result[0]) == 12 + len(generated) - 1


def test_parameters_of_several_prompts_stay_their_callers(engine, known):
    """Prompts share parameter objects: each is sampled by its own, and nothing is written into them."""
    lengths = [12, 80, 5, 33]
    plain = engine.generate(prompts(lengths))
    stopping = greedy(ignore_eos=False, stop_token_ids=[plain[1][3]], extra_args={"mine": [1]})
    params = [greedy(), stopping, stopping, greedy()]
    before = copy.deepcopy(params)
    outputs = engine.llm.generate(prompts(lengths), copy.deepcopy(params), use_tqdm=False)
    result = engine.capture(prompts(lengths), HIDDEN, sampling_params=params)
    compare(result, known)
    assert params == before
    assert [list(output.outputs[0].token_ids) for output in result.outputs] == [
        list(output.outputs[0].token_ids) for output in outputs
    ]
    assert len(result.outputs[1].outputs[0].token_ids) <= 4


def test_a_single_new_token_leaves_the_rows_of_the_prompt(engine, known):
    """With max_tokens=1 nothing generated enters the model: rows are the prompt's, generated rows are none."""
    result = engine.capture(prompts(), HIDDEN, max_tokens=1)
    compare(result, known)
    assert [len(sample) for sample in result] == list(PROMPT_LENGTHS)
    spec = Spec(hidden_states="all", positions="generated", missing="skip")
    nothing = engine.capture(prompts([4, 6]), spec, max_tokens=1)
    assert [tuple(sample.hidden_states[1].shape) for sample in nothing] == [(0, 128)] * 2


def test_tokens_are_read_while_the_engine_computes(engine, known, monkeypatch):
    """The lists that are read are those in the outputs, and few tokens are left to read when the last one comes."""
    seen: list[dict[int, int]] = []

    def read(tokens: TokenArrays, lists: list[list[int]]) -> None:
        seen.append({id(ids): len(ids) for ids in lists})
        original(tokens, lists)

    original = TokenArrays.read
    monkeypatch.setattr(TokenArrays, "read", read)
    result = engine.capture(prompts([5, 40]), HIDDEN, max_tokens=3 * STEPS_BETWEEN)
    compare(result, known)
    for output in result.outputs:
        assert seen[0][id(output.prompt_token_ids)] == len(output.prompt_token_ids)
        assert seen[-1][id(output.outputs[0].token_ids)] >= 2 * STEPS_BETWEEN - 1


def test_the_longest_prompt_is_captured_whole(engine, known):
    """A prompt of max_model_len - 1 tokens, in four chunks, has a row for each."""
    result = engine.capture(prompts([MAX_MODEL_LEN - 1]), HIDDEN)
    compare(result, known)
    assert len(result[0]) == MAX_MODEL_LEN - 1


def test_captures_follow_each_other_with_other_specifications(engine, known):
    """Each capture of one engine has what its own specification asks for; earlier results stay as they were."""
    first = engine.capture(prompts(), Spec(hidden_states=[1]))
    before = first[4].hidden_states[1].clone()
    others = [Spec(final_hidden_states=True), Spec(embeddings=True, positions="last"), HIDDEN, Spec(hidden_states=[1])]
    for spec in others:
        result = engine.capture(prompts(seed=4), spec)
        assert set(result.layers) == set(spec.streams)
        compare(result, known, last_position if spec.positions == "last" else None)
    assert first[4].hidden_states[1].equal(before)
    compare(first, known)


def test_a_prompt_given_as_text_is_captured(engine, known):
    """A single string is tokenized by the engine; labels are its tokens."""
    result = engine.capture("the quick brown fox", HIDDEN)
    assert result[0].token_ids[:19].tolist() == list(result.outputs[0].prompt_token_ids)
    compare(result, known)


def test_captured_requests_do_not_read_the_prefix_cache(engine, known):
    """Rows of a prefix that the cache holds arrive all the same; plain requests go on hitting the cache."""
    given = prompts([4 * BLOCK_SIZE + 5], seed=5)
    shared = given[0]["prompt_token_ids"][: 3 * BLOCK_SIZE]
    following = [{"prompt_token_ids": shared + prompt["prompt_token_ids"]} for prompt in prompts([9, 30], seed=6)]
    engine.generate(given)
    assert cached(engine, following) == [3 * BLOCK_SIZE] * 2
    result = engine.capture(following, HIDDEN)
    assert [output.num_cached_tokens for output in result.outputs] == [0, 0]
    compare(result, known)
    assert min(cached(engine, following)) >= 3 * BLOCK_SIZE


SHARED = 6 * BLOCK_SIZE


@pytest.mark.parametrize(
    ("positions", "num_cached"),
    [
        ("last", SHARED),
        ("generated", SHARED),
        ("last_generated", SHARED),
        ([-1], SHARED),
        (Positions.prompt(-1) | Positions.generated(step=3), SHARED),
        (Positions.prompt(-9, -3), SHARED),
        (Positions.prompt(2 * BLOCK_SIZE + 5) - Positions.at([2 * BLOCK_SIZE + 7]), 2 * BLOCK_SIZE),
        ([3 * BLOCK_SIZE, -1], 3 * BLOCK_SIZE),
        ([3 * BLOCK_SIZE - 1, -1], 2 * BLOCK_SIZE),
        (Positions.prompt(-BLOCK_SIZE), 5 * BLOCK_SIZE),
        (Positions.tokens(range(256)), 0),
        ("prompt", 0),
        ("all", 0),
    ],
    ids=str,
)
def test_a_request_reads_the_prefix_cache_up_to_its_first_wanted_position(engine, known, positions, num_cached):
    """Rows behind what was cached equal those of a forward pass without a cache; what is asked for is complete."""
    (given,) = prompts([SHARED + 10], seed=15)
    engine.generate([given])
    result = engine.capture([given], Spec(hidden_states=[0, 3], positions=positions))
    assert result.outputs[0].num_cached_tokens == num_cached
    tokens = sequence(result.outputs[0])
    at = result[0].positions.tolist()
    assert at == Sequences(result.outputs, result.spec.positions).wanted.tolist() != []
    compare(result, known, lambda *_: at)
    assert result[0].token_ids.tolist() == [tokens[position] for position in at]


def test_parameters_that_skip_the_cache_still_do(engine, known):
    """Of one who asks for it, or for log probabilities of the prompt."""
    given = prompts([SHARED + 10], seed=15)
    engine.generate(given)
    for fields in ({"skip_reading_prefix_cache": True}, {"prompt_logprobs": 1}):
        for positions in ("last", Positions.prompt(-9)):
            spec = Spec(hidden_states=[1], positions=positions)
            result = engine.capture(given, spec, sampling_params=greedy(**fields))
            assert result.outputs[0].num_cached_tokens == 0


def test_captured_requests_fill_the_prefix_cache(engine):
    """A plain request after a capture of the same prompt finds its blocks in the cache."""
    given = prompts([2 * BLOCK_SIZE + 3], seed=8)
    engine.capture(given, HIDDEN)
    assert cached(engine, given) == [2 * BLOCK_SIZE]


def cached(engine: Engine, given: list[dict[str, list[int]]]) -> list[int]:
    """Return how many tokens of each prompt the cache held, for plain requests."""
    return [output.num_cached_tokens for output in engine.llm.generate(given, greedy(), use_tqdm=False)]


def test_what_cannot_be_asked_for_is_refused(engine):
    """Wrong specifications, prompts and parameters raise before anything runs, and say what would be right."""
    with pytest.raises(SpecError, match=r'vllm_tap.Spec, or a list .*, got str.*Spec\(hidden_states="all"\)'):
        engine.capture(prompts(), "all")
    with pytest.raises(SpecError, match="prompts is empty"):
        engine.capture([], HIDDEN)
    with pytest.raises(SpecError, match=r"expected a vllm\.LLM, got str"):
        vllm_tap.capture("some/model", prompts(), HIDDEN)
    with pytest.raises(SpecError, match=r"expected a vllm\.LLM, got LLMEngine"):
        vllm_tap.Recording(engine.llm.llm_engine, HIDDEN)
    with pytest.raises(SpecError, match="prompt 0 has prompt_embeds"):
        engine.capture([{"prompt_embeds": torch.zeros(3, 64)}], HIDDEN)
    with pytest.raises(SpecError, match="prompt 1 is a int"):
        engine.capture(["a", 5], HIDDEN)
    with pytest.raises(LayerError, match=r"no layer 4: it has 4 decoder layers, 0 to 3 \(or -4 to -1\)"):
        engine.capture(prompts(), Spec(hidden_states=[0, 4]))
    with pytest.raises(SpecError, match=r"no field 'temprature'.*'temperature'"):
        engine.capture(prompts(), HIDDEN, temprature=0.0)
    with pytest.raises(SpecError, match="not both"):
        engine.capture(prompts(), HIDDEN, sampling_params=greedy(), max_tokens=3)
    with pytest.raises(SpecError, match="2 sampling_params for 8 prompts"):
        engine.capture(prompts(), HIDDEN, sampling_params=[greedy()] * 2)
    with pytest.raises(SpecError, match='"segment", "tcp", "nixl" or "inline"'):
        engine.capture(prompts(), HIDDEN, transport="carrier pigeon")
    with pytest.raises(SpecError, match="positive"):
        engine.capture(prompts(), HIDDEN, budget_bytes=0)
    from vllm import PoolingParams

    for nbytes in (1.5, float("inf"), "1GiB"):
        with pytest.raises(SpecError, match="budget_bytes is a positive whole number"):
            engine.capture(prompts(), HIDDEN, budget_bytes=nbytes)
    for params in ({"max_tokens": 2}, PoolingParams()):
        with pytest.raises(SpecError, match=r"are vllm\.SamplingParams, got (dict|PoolingParams)"):
            engine.capture(prompts(), HIDDEN, sampling_params=params)
    with pytest.raises(SpecError, match="prompt 0 is a bool"):
        engine.capture([True, 1], HIDDEN)
    assert [state["captures"] for state in engine.status()] == [[]]


def test_token_ids_are_prompts(engine, known):
    """Lists of token ids do without a dict around them, as for vLLM; one list is one prompt."""
    lists = [prompt["prompt_token_ids"] for prompt in prompts()]
    compare(engine.capture(lists, HIDDEN), known)
    assert engine.capture(lists[0], HIDDEN)[0].token_ids[: len(lists[0])].tolist() == lists[0]


def test_layers_can_be_asked_for(engine):
    """A sample's streams are mappings: `in` and `get` answer for layers that were not captured, negative ones too."""
    rows = engine.capture(prompts([5]), Spec(hidden_states=[1, -1]))[0].hidden_states
    last = 3
    assert [layer in rows for layer in (0, 1, last, -1, -2, 99, "x", None)] == [False, True, True, True, *[False] * 4]
    assert [rows.get(layer) for layer in (0, "x", None, 1.0)] == [None] * 4
    with pytest.raises(LayerError, match=r"layer 1\.5 was not captured"):
        rows[1.5]
    assert rows.get(-1).equal(rows[last])


def test_tensors_outlive_the_engine_object(engine, known):
    """After the LLM is let go of and its processes are gone, all rows of a capture can still be read."""
    result = engine.capture(prompts(), Spec(hidden_states="all", embeddings=True))
    views = [sample.hidden_states[2] for sample in result]
    copies = [view.clone() for view in views]
    engine.close()
    assert all(torch.equal(view, copy) for view, copy in zip(views, copies, strict=True))
    compare(result, known)
