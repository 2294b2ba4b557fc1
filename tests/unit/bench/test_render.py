"""Tables of documents come from results files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_tap.bench.render import main, render

RESULTS = {
    "machine": {"gpu": "Some GPU", "cpus": 8, "python": "3.12.0", "torch": "2.13.0", "vllm": "0.32.0"},
    "command": "bench/gpu.py --shape tiny",
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
    head = "| workload | arm | ratio to plain | in pairs | of as many steps | ms a step | rows GB | GB/s |"
    assert text.count(head) == 2
    assert "| prefill 1 x 10 | plain | 1.000 | 1.000 |  |  |  |  |" in text
    assert "| prefill 1 x 10 | all / auto | 0.962 | 0.967 |  |  | 13 | 25 |" in text
    assert "| decode 1 x 10 | plain | 1.000 | 1.000 | 1.000 | 5.000 |  |  |" in text
    assert text.count("### gpu-b: Some GPU\n\n8 processors") == 1
    assert text.count("Ratio: time of the plain engine") == 1
    assert "55.3 GB/s" in text
    assert "[gpu-b.json](bench/results/gpu-b.json)" in text
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
    """A column for each arm that leaves staging to the engine; of two measurements, that beside a plain engine."""
    rows = RESULTS["rows"]
    (tmp_path / "gpu-a.json").write_text(json.dumps(RESULTS | {"plain": "idle engine"}))
    better = [
        rows[0],
        rows[1] | {"ratio": 0.97, "paired": 0.971},
        rows[1] | {"arm": "idle", "workload": "decode 1 x 10"},
        rows[1] | {"arm": "all / direct"},
    ]  # type: ignore[operator,index]
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
    assert "Rounds of 3 calls, all times of each scaled" in render(MARKED, tmp_path)


def test_ratios_of_an_idle_engine_say_so(tmp_path: Path) -> None:
    """In the summary and above the file's own table: no plain engine was measured."""
    (tmp_path / "gpu-a.json").write_text(json.dumps(RESULTS | {"plain": "idle engine"}))
    assert "| 0.962 (0.967) of idle |" in render(SUMMARY, tmp_path)
    assert "The idle engine stands for a plain one. 8 processors" in render(MARKED, tmp_path)


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
    assert "load average 0.1 before, 1.2 after" in text


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
    assert "ratio to plain" not in text
