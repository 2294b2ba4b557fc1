"""Ctrl-C in a terminal in which `vllm-tap capture` or `record` runs: what it says, what it saves, what it leaves."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from vllm_tap import open_dataset

pytestmark = pytest.mark.engine

NUM_PROMPTS = 4000
MAX_TOKENS = 8
BATCH = 100
INTERRUPT = b"\x03"


class Terminal:
    """A terminal of 60 columns with a command in its foreground."""

    def __init__(self, *command: str) -> None:
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.execvp(command[0], command)
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
        self._text = ""

    def press(self, keys: bytes) -> None:
        """Type; what was shown so far is forgotten."""
        self._text = ""
        os.write(self._end, keys)

    def read_until(self, pattern: str) -> str:
        """Wait until something is shown, or nothing more can be; return what was."""
        while not re.search(pattern, self._text):
            try:
                self._text += os.read(self._end, 1 << 16).decode(errors="replace").replace("\r\n", "\n")
            except OSError:  # the last process that could write has gone
                return self._text
        return self._text

    def wait(self) -> int:
        """Return the exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def start(tiny_model: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """A function that starts a capture of many prompts, or a recording; nothing of it is left behind the test."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Prompt {number}\n" for number in range(NUM_PROMPTS)))
    commands = {"capture": f"--save {tmp_path / 'rows.safetensors'}", "record": f"{tmp_path / 'run'} --batch {BATCH}"}
    options = ["--enforce-eager", "--max-tokens", str(MAX_TOKENS), "--engine", '{"gpu_memory_utilization": 0.2}']
    program = "import sys; from vllm_tap.cli import command; sys.exit(command())"
    started: list[Terminal] = []

    def call(name: str = "capture") -> Terminal:
        command = f"{name} {tiny_model('llama')} {commands[name]} --prompts {prompts} --layers 0,-1"
        started.append(Terminal(sys.executable, "-c", program, *command.split(), *options))
        return started[-1]

    yield call
    for terminal in started:
        if psutil.pid_exists(terminal.pid):
            process = psutil.Process(terminal.pid)
            for left in [*process.children(recursive=True), process]:
                left.kill()


def family(terminal: Terminal) -> list[psutil.Process]:
    """Return the processes of the engine."""
    return psutil.Process(terminal.pid).children(recursive=True)


def test_what_is_finished_is_saved(
    start: Callable[[], Terminal], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """One line says how many; the file has just these, whole, and the engine is gone without a word."""
    terminal = start()
    assert "%|" in (text := terminal.read_until(r" [1-9]\d%\|")), text
    engine = family(terminal)
    terminal.press(INTERRUPT)
    text = terminal.read_until(r"vllm-tap: .*\n")
    assert terminal.wait() == 130, text
    (line,) = [line for line in re.split(r"[\r\n]+", text.replace("^C", "")) if line and "%|" not in line]
    found = re.match(r"vllm-tap: interrupted: ([\d,]+) of 4,000 samples were finished, saved .*rows.safetensors", line)
    assert found, line
    num_finished = int(found[1].replace(",", ""))
    assert 0 < num_finished < NUM_PROMPTS
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    with safe_open(tmp_path / "rows.safetensors", "pt") as stored:
        samples = {int(name.split(".")[0]) for name in stored.keys()}  # noqa: SIM118 - not a mapping
        assert len(samples) == num_finished
        for sample in samples:
            prompt = tokenizer.encode(f"Prompt {sample}")
            num_rows = len(prompt) + MAX_TOKENS - 1  # the last token never enters the model
            assert stored.get_tensor(f"{sample}.token_ids")[: len(prompt)].tolist() == prompt
            assert stored.get_slice(f"{sample}.hidden_states.3").get_shape()[0] == num_rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "rows.safetensors"]
    psutil.wait_procs(engine, 2)  # those that were killed as the command ended
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in engine)


def test_an_engine_that_starts_is_ended(start: Callable[[], Terminal], tmp_path: Path) -> None:
    """Nothing is to be kept: one line, no traceback, no process, no file."""
    terminal = start()
    assert "(Worker" in (text := terminal.read_until(r"\(Worker pid")), text
    engine = family(terminal)
    terminal.press(INTERRUPT)
    text = terminal.read_until("never shown")
    assert terminal.wait() == 130, text
    assert text.replace("^C", "").strip().splitlines()[-1] == "vllm-tap: interrupted while the engine started", text
    assert "Traceback" not in text
    psutil.wait_procs(engine, timeout=60)
    assert not any(process.is_running() for process in engine)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_recording_that_is_ended_can_be_gone_on_with(start: Callable[..., Terminal], tmp_path: Path) -> None:
    """One line says how; whole parts are in the dataset, and nothing of the engine is left."""
    terminal = start("record")
    assert "samples 0 to 99" in (text := terminal.read_until(r"samples [\d,]+ to")), text
    engine = family(terminal)
    terminal.press(INTERRUPT)
    text = terminal.read_until("never shown")
    assert terminal.wait() == 130, text
    lines = [line for line in re.split(r"[\r\n]+", text.replace("^C", "")) if line and "%|" not in line]
    assert lines[-1].startswith("vllm-tap: interrupted: whole parts are in the dataset, and the same command with --r")
    assert all(line.startswith("samples ") for line in lines[:-1]), lines
    psutil.wait_procs(engine, timeout=60)
    assert not any(process.is_running() for process in engine)
    dataset = open_dataset(tmp_path / "run")
    assert len(dataset) % BATCH == 0
    assert 0 < len(dataset) < NUM_PROMPTS
    assert [sample.prompt for sample in dataset] == [f"Prompt {number}" for number in range(len(dataset))]
