"""Tables of documents come from results files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_tap.bench.machine import describe_commit
from vllm_tap.bench.render import main, render

RESULTS = {
    "machine": {"gpu": "Some GPU", "cpus": 8, "python": "3.12.0", "torch": "2.13.0", "vllm": "0.32.0"},
    "command": "bench/gpu.py --shape tiny",
    "commit": "abc1234",
    "shape": "tiny",
    "rates_gb_per_s": {"d2h": 55.34, "device_copy": 4301.0},
    "rows": [
        {"workload": "prefill 1 x 10", "arm": "plain", "seconds": 0.5, "ratio": 1.0, "paired": 1.0, "bytes": 0,
         "all": [0.5] * 5, "parts": {}, "steps": [{"steps": 2, "step_ms": 250.0}]},
        {"workload": "prefill 1 x 10", "arm": "all / auto", "seconds": 0.52, "ratio": 0.96154, "paired": 0.9666,
         "bytes": 13 * 10**9, "all": [0.52] * 5, "parts": {"start": 0.1}},
        {"workload": "decode 1 x 10", "arm": "plain", "seconds": 0.5, "ratio": 1.0, "paired": 1.0, "bytes": 0,
         "all": [0.5] * 5, "parts": {}, "steps": [{"steps": 100, "step_ms": step} for step in (4.0, 5.0, 9.0)]},
    ],
}  # fmt: skip

MARKED = "before\n<!-- bench:gpu-tables -->\nold\n<!-- /bench:gpu-tables -->\nafter\n"
SUMMARY = MARKED.replace("gpu-tables", "gpu")


def test_a_table_for_every_gpu_file(tmp_path: Path) -> None:
    """Each results file becomes a table with its machine, command and name; arms without rows have empty cells."""
    for name in ("gpu-a.json", "gpu-b.json", "other.json"):
        (tmp_path / name).write_text(json.dumps(RESULTS))
    text = render(MARKED, tmp_path)
    head = "| workload | variant | ratio | paired | same steps | ms a step | rows GB | GB/s |"
    assert text.count(head) == 2
    assert "| prefill 1 x 10 | plain | 1.000 | 1.000 |  |  |  |  |" in text
    assert "| prefill 1 x 10 | all / auto | 0.962 | 0.967 |  |  | 13 | 25 |" in text
    assert "| decode 1 x 10 | plain | 1.000 | 1.000 | 1.000 | 5.000 |  |  |" in text
    assert text.count("### gpu-b: Some GPU\n\n| workload") == 1
    assert text.count("*Ratio*: time of the plain engine") == 1
    assert (
        "| [gpu-b.json](bench/results/gpu-b.json) | `abc1234` | `bench/gpu.py --shape tiny` | Some GPU, 8 proc" in text
    )
    assert "55.3 GB/s" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text


@pytest.mark.parametrize(("steps", "ratio"), [([8, 9, 9, 9, 9], "0.800"), ([8, 8, 8, 9, 9], "")])
def test_runs_of_as_many_steps_are_compared(tmp_path: Path, steps: list[int], ratio: str) -> None:
    """As the plain engine took most often: 9 here. Of two runs there is no median."""
    arm = {"workload": "prefill 1 x 10", "seconds": 1.0, "ratio": 1.0, "paired": 1.0, "bytes": 0}
    rows = [
        arm | {"arm": arm_name, "all": seconds, "steps": [{"steps": n, "step_ms": 1.0} for n in numbers]}
        for arm_name, seconds, numbers in (
            ("plain", [1.0, 0.9, 1.0, 7.0, 1.1], [9, 9, 9, 8, 9]),
            ("idle", [0.5, 1.25, 1.5, 1.25, 1.0], steps),
        )
    ]
    (tmp_path / "gpu-a.json").write_text(json.dumps(RESULTS | {"rows": rows}))
    assert f"| prefill 1 x 10 | idle | 1.000 | 1.000 | {ratio} |" in render(MARKED, tmp_path)


def test_what_ran_once_is_no_measurement(tmp_path: Path) -> None:
    """An arm of one round, as in the plan that measures least, is left out."""
    once = RESULTS["rows"][1] | {"all": [0.52], "workload": "decode 9 x 10"}  # type: ignore[operator,index]
    (tmp_path / "gpu-a.json").write_text(json.dumps(RESULTS | {"rows": [*RESULTS["rows"], once]}))  # type: ignore[misc]
    assert "prefill 1 x 10" in render(MARKED, tmp_path)
    assert "decode 9 x 10" not in render(MARKED, tmp_path)


def test_a_summary_has_a_line_for_each_workload(tmp_path: Path) -> None:
    """A column for each arm that leaves staging to the engine; results without a plain engine are left out."""
    rows = RESULTS["rows"]
    (tmp_path / "gpu-a.json").write_text(json.dumps(RESULTS | {"plain": "idle engine"}))
    better = [
        rows[0],
        rows[2],
        rows[1] | {"ratio": 0.97, "paired": 0.971},
        rows[1] | {"arm": "idle", "workload": "decode 1 x 10"},
        rows[1] | {"arm": "all / direct"},
    ]  # type: ignore[operator,index,misc]
    real = {"plain": "engine without the plugin", "rows": better}
    (tmp_path / "gpu-b.json").write_text(json.dumps(RESULTS | real))
    other = {"machine": RESULTS["machine"] | {"gpu": "Another GPU"}, "tp2_shares": [0.5, 0.5]}  # type: ignore[operator]
    (tmp_path / "gpu-c.json").write_text(json.dumps(RESULTS | other))
    lines = [
        "| GPU | shape | workload | idle | all |",
        "|---|---|---|---|---|",
        "| Some GPU | tiny | decode 1 x 10 | 0.962 (0.967) |  |",
        "| Some GPU | tiny | prefill 1 x 10 |  | 0.970 (0.971) |",
        "| Another GPU | tiny, 2 ranks | prefill 1 x 10 |  | 0.962 (0.967) |",
    ]
    assert "\n".join(lines) in render(SUMMARY, tmp_path)


def test_a_summary_compares_runs_of_as_many_steps(tmp_path: Path) -> None:
    """Where there are enough of them: the plain engine took 9 steps most often, and as many runs of the arm 0.8."""
    arm = {"workload": "decode 8 x (64 + 128)", "ratio": 1.2, "paired": 1.1, "bytes": 0, "seconds": 1.0}
    steps = [{"steps": 9, "step_ms": 1.0}] * 3 + [{"steps": 8, "step_ms": 1.0}] * 2
    rows = [
        arm | {"arm": "plain", "all": [1.0, 1.0, 1.0, 7.0, 7.0], "steps": steps},
        arm | {"arm": "all layers / auto", "all": [1.25, 1.25, 1.25, 0.1, 0.1], "steps": steps},
        arm | {"arm": "extract_hidden_states", "all": [2.0, 2.0]},
    ]
    (tmp_path / "gpu-a.json").write_text(json.dumps(RESULTS | {"shape": "llama-8b", "rows": rows}))
    assert "| decode 8 x (64 + 128) | 0.800 (1.100) | 1.200 (1.100) |" in render(SUMMARY, tmp_path)
    headlines = render(SUMMARY.replace("bench:gpu ", "bench:gpu-headlines "), tmp_path)
    assert "| Llama-3.1-8B | 8 prompts of 64 tokens, 128 generated | all layers | 0.800 |  | 1.200 |" in headlines


def test_a_document_in_a_folder_links_to_the_results_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/measured.md does; `--check` fails while a document is out of date."""
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (results / "gpu-a.json").write_text(json.dumps(RESULTS))
    documents = [tmp_path / "README.md", tmp_path / "docs" / "measured.md"]
    documents[1].parent.mkdir()
    for document in documents:
        document.write_text(MARKED)
    monkeypatch.setattr("sys.argv", ["render", *map(str, documents), "--check"])
    with pytest.raises(SystemExit, match="out of date"):
        main()
    monkeypatch.setattr("sys.argv", ["render", *map(str, documents)])
    main()
    assert "[gpu-a.json](bench/results/gpu-a.json)" in documents[0].read_text()
    assert "[gpu-a.json](../bench/results/gpu-a.json)" in documents[1].read_text()
    monkeypatch.setattr("sys.argv", ["render", *map(str, documents), "--check"])
    main()


def test_a_table_says_how_ranks_shared_the_bytes(tmp_path: Path) -> None:
    """Results of several tensor-parallel ranks."""
    (tmp_path / "gpu-a.json").write_text(json.dumps(RESULTS | {"tp2_shares": [0.5, 0.498]}))
    text = render(MARKED, tmp_path)
    assert "### gpu-a: Some GPU, 2 ranks\n" in text
    assert "The ranks copied 0.50 and 0.50 of what one rank alone copies." in text


def test_a_table_says_of_how_many_calls_it_is(tmp_path: Path) -> None:
    """Results whose rounds are of several."""
    (tmp_path / "gpu-a.json").write_text(json.dumps(RESULTS | {"num_calls": 3}))
    assert "Rounds of 3 calls; all times of a call are scaled" in render(MARKED, tmp_path)


def test_ratios_of_an_idle_engine_say_so(tmp_path: Path) -> None:
    """Above the file's own table; in the summary they are left out, as no plain engine was measured."""
    (tmp_path / "gpu-a.json").write_text(json.dumps(RESULTS | {"plain": "idle engine"}))
    assert "The idle engine stands for a plain one.\n\n| workload" in render(MARKED, tmp_path)
    assert "Nothing has been measured" in render(SUMMARY, tmp_path)


@pytest.mark.parametrize(
    ("facts", "cell"),
    [({"commit": "abc-dirty"}, "`abc-dirty`"), ({"added_in": "def"}, "added in `def`"), ({}, "unknown")],
)
def test_results_name_their_commit(tmp_path: Path, facts: dict[str, str], cell: str) -> None:
    """The one that was measured; of older results the one that added them."""
    results = {name: value for name, value in RESULTS.items() if name != "commit"}
    (tmp_path / "gpu-a.json").write_text(json.dumps(results | facts))
    assert f"| [gpu-a.json](bench/results/gpu-a.json) | {cell} | `bench" in render(MARKED, tmp_path)


def test_a_benchmark_asks_git_for_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the environment names it, for a tree that came without its history."""
    assert describe_commit() != ""
    monkeypatch.setenv("VLLM_TAP_COMMIT", "abc1234")
    assert describe_commit() == "abc1234"


def test_checks_of_a_gpu_have_tables(tmp_path: Path) -> None:
    """Memory of the last engines of a kind, short generations, copies, bad cases and mechanisms."""

    def engine(tapped: bool, blocks: int, mib: int) -> dict[str, Any]:
        return {"tapped": tapped, "blocks": blocks, "idle": {"reserved": mib << 20, "graphs": 0, "driver": 1 << 20}}

    def short(case: str, ms: float, faults: float) -> dict[str, Any]:
        return {"case": case, "workload": "1 x (64 + 1)", "ms": ms, "faults": faults}

    parts = {
        "memory": [engine(False, 9, 90), engine(True, 9, 99), engine(False, 10, 40), engine(True, 10, 42)],
        "hosts": [
            short("idle", 2.0, 5.0),
            short("plain", 1.0, 32.0),
            short("idle", 4.0, 5.0),
            short("plain", 2.0, 32.0),
        ],
        "parts": [{"workload": "decode 8", "dma": [{"copies": 14.6, "share_of_d2h": 0.99401}]}],
        "cases": [{"case": "client killed", "verdict": "PASS"}],
    }
    for name, part in parts.items():
        results = {key: value for key, value in RESULTS.items() if key != "rows"}
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps(results | {name: part}))
    rows = [
        {"mechanism": "m", "measured": "x", "without": "2", "with": "1", "command": "", "machine": "", "added_in": "d"}
    ]
    (tmp_path / "mechanisms.json").write_text(json.dumps({"rows": rows}))
    names = ("memory", "host", "copies", "bad-cases", "mechanisms")
    text = render("".join(f"<!-- bench:{name} -->\n<!-- /bench:{name} -->\n" for name in names), tmp_path)
    assert "| blocks of KV cache, without and with | 10 and 10 |" in text
    assert "| PyTorch, all of it | 2 |" in text
    assert "| 1 x (64 + 1) | idle | 3.0 | 1.5 | 5.0 | 32.0 |" in text
    assert "| Some GPU | tiny | decode 8 | 14.6 | 0.994 |" in text
    assert "| client killed | pass |" in text
    assert "| m | x | 2 | 1 | not recorded | not recorded | added in `d` |" in text


def test_no_gpu_file_is_said_in_words(tmp_path: Path) -> None:
    """Without results the document says that there are none."""
    for marked in (MARKED, SUMMARY):
        assert "Nothing has been measured on a GPU yet." in render(marked, tmp_path)


def test_results_without_rows_have_no_table(tmp_path: Path) -> None:
    """A plan that checks cases and times nothing leaves no empty table."""
    (tmp_path / "gpu-a.json").write_text(json.dumps(RESULTS))
    (tmp_path / "gpu-bad.json").write_text(json.dumps({"machine": RESULTS["machine"], "cases": []}))
    assert render(MARKED, tmp_path).count("| workload |") == 1


def test_rendering_twice_changes_nothing(tmp_path: Path) -> None:
    """A document that was rendered is up to date."""
    (tmp_path / "gpu-a.json").write_text(json.dumps(RESULTS))
    once = render(MARKED, tmp_path)
    assert render(once, tmp_path) == once


@pytest.mark.parametrize(
    "text",
    ["<!-- bench:gpu -->\n", "<!-- bench:gpu -->\n<!-- /bench:handover -->\n", MARKED.replace("gpu-tables", "none")],
)
def test_markers_that_do_not_pair_are_refused(text: str, tmp_path: Path) -> None:
    """A marker without its partner, or of no known name, raises instead of leaving an old table."""
    with pytest.raises(ValueError, match="marker"):
        render(text, tmp_path)


def test_claims_stand_beside_what_was_measured(tmp_path: Path) -> None:
    """The seed table has a line a way, times the last, and says of each claim whether it holds."""
    machine = {
        "cpu": "Some CPU",
        "cores": 2,
        "kernel": "Linux",
        "python": "3.12.0",
        "numpy": "2.3.5",
        "torch": "2.13.0",
    }
    rows = [
        {"method": "lists", "label": "lists", "median_ms": 5000.0, "rounds": 3, "measured_rows": 100, "scaled_by": 10},
        {"method": "segment", "label": "ours", "median_ms": 5.0, "rounds": 3, "measured_rows": 1000, "scaled_by": 1},
    ]
    shape = {"num_layers": 32, "shape": [1000, 4096], "dtype": "bfloat16", "nbytes": 262144000}
    claim = {
        "claim": "a layer",
        "claimed_ms": [200, 0.5],
        "claimed_gain": 400,
        "measured_ms": [300, 3],
        "measured_gain": 100,
    }
    results = {
        "machine": machine,
        "command": "bench",
        "engine": {"model": "Llama", **shape, "rows": rows},
        "claims": [claim | {"holds": False}, claim | {"claim": "another", "holds": True}],
        "load_average": [0.1, 1.2],
    }
    (tmp_path / "seed-cpu.json").write_text(json.dumps(results))
    text = render("<!-- bench:seed -->\n<!-- /bench:seed -->\n", tmp_path)
    assert "| lists (measured on 100 rows, times 10) | 5 s | 1000x |" in text
    assert "| ours | 5 ms | 1x |" in text
    assert "| a layer | 200 ms, 0.5 ms, 400x | 300 ms, 3 ms, 100x | no |" in text
    assert "| another |" in text
    assert "yes |" in text
    assert "| `bench` | Some CPU, 2 cores, Linux" in text


def test_forward_passes_have_a_table_of_their_own(tmp_path: Path) -> None:
    """Medians over rounds, by arm."""
    ms = [
        {"first armed": 5.0 + n, "first begins": 0.5, "passes": 100.0 + n, "between": 4.0, "end": 2.0} for n in range(3)
    ]
    forwards = [{"workload": "prefill 1 x 10", "arm": "idle", "ms": ms}]
    row = "| prefill 1 x 10 | idle | 6.5 | 101.0 | 4.0 | 2.0 |"
    (tmp_path / "gpu-a.json").write_text(json.dumps(RESULTS | {"forwards": forwards}))
    assert row in render(MARKED, tmp_path)
    once = [measured | {"all": [0.5]} for measured in RESULTS["rows"]]  # type: ignore[operator,attr-defined]
    (tmp_path / "gpu-a.json").write_text(json.dumps(RESULTS | {"forwards": forwards, "rows": once}))
    text = render(MARKED, tmp_path)
    assert row in text
    assert "same steps |" not in text


def test_a_server_under_load_has_a_row_for_each_arm(tmp_path: Path) -> None:
    """With what it was measured on, and how."""
    row = {"requests_per_s": 12.345, "itl_ms": 40.0, "p99_itl_ms": 1500.0, "cpu_ms": 250.0, "row_bytes": 0}
    results = {
        "command": "python bench/serve_load.py --model M", "commit": "abc1234", "model": "M", "rounds": 3,
        "requests": 64, "at_a_time": 16, "input": 60, "output": 30, "spread": 0.5,
        "machine": {"cpu": "X", "cores": 2, "kernel": "L", "python": "3.11", "torch": "2.13", "vllm": "0.32"},
        "rows": [
            {"arm": "plain vllm serve", "requests_ratio": 1.0, "itl_ratio": 1.0, "cpu_ratio": 1.0, **row},
            {"arm": "all of requests", "requests_ratio": 0.98765, "itl_ratio": 0.9, "cpu_ratio": 0.97, **row},
        ],
    }  # fmt: skip
    (tmp_path / "serve-cpu.json").write_text(json.dumps(results))
    text = render(MARKED.replace("gpu-tables", "serve"), tmp_path)
    assert "| plain vllm serve | 12.3 | 1.000 | 40 ms | 1.000 | 1.5 s | 250 ms | 1.000 |" in text
    assert "| all of requests | 12.3 | 0.988 | 40 ms | 0.900 | 1.5 s | 250 ms | 0.970 |" in text
    assert "M. 64 requests, 16 at a time, of 60 tokens, 30 generated for each, give or take 50%; 3 rounds." in text
    assert "| [serve-cpu.json](bench/results/serve-cpu.json) | `abc1234` |" in text
