"""Writes docs/architectures.md from the results. Runs in the process of `run.py`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"

HEAD = """# Architectures

What captures give for each family of models, checked on tiny random models:
{num_pass} families pass, {num_wrong} differ, {num_refused} are refused with a reason, {num_not_run} could not be run.
Rendered by `make architectures` from `architectures/results.json`; do not edit.

vLLM {vllm}, transformers {transformers}, torch {torch}; processor, float32, eager, V1 runner unless the row or a
remark says otherwise. Three prompts of 3, 17 and 40 random tokens, four generated tokens each, in steps of at most 64
tokens: every row of every layer is compared.

- **returns**: what a decoder layer returns, as decided by the engine from the model's final norm. `sum`: the stream is
  hidden + residual; `whole`: the first item is the stream.
- **checked by**: *Hugging Face*: hidden states after every decoder layer, embeddings, final hidden states and router
  logits against hooks on the modules of transformers. *The engine's norms*: no other implementation agrees or exists.
  Then the rows of layer i, under the norm that layer i + 1 begins with, are what that norm returned. The rows of
  the last layer under the final norm are the final hidden states. Router logits are what the gate makes of its
  block's input.
- **sum of blocks**: what attention and MLP add to the stream before a layer gives the stream behind it, to this error.
  Where transformers has a module for either, its rows are compared too, and are part of **error**.
- **error**: the largest difference over the root mean square of the layer. Up to 1e-4 passes: both sides compute in
  float32 and add in other orders (0.05 where a remark says bfloat16). Rows of another token, layer or convention are
  off by 0.1 or more.
"""


def render(results: dict[str, Any]) -> None:
    """Write the document."""
    rows = list(results["families"].values())
    by_status = {status: [row for row in rows if row["status"] == status] for status in STATUSES}
    counts = {f"num_{status.replace('-', '_')}": len(found) for status, found in by_status.items()}
    parts = [HEAD.format(**counts, **results["versions"])]
    if by_status["wrong"]:
        parts.append("## Differ\n\n" + _table(by_status["wrong"]) + "\n\n" + _reasons(by_status["wrong"]))
    parts.append("## Pass\n\n" + _table(by_status["pass"]))
    noted = [row for row in by_status["pass"] if _remarks(row)]
    if noted:
        parts.append("### Remarks\n\n" + "\n".join(f"- **{row['family']}**: {_remarks(row)}" for row in noted) + "\n")
    without = [row for row in by_status["pass"] if any(_is_reason(said) for said in row.get("blocks", {}).values())]
    if without:
        parts.append(
            "### What blocks add is refused\n\nSuch a capture raises this error; other streams are there.\n\n"
            + "\n".join(f"- **{row['family']}**: {_said(row)}" for row in without)
            + "\n"
        )
    if by_status["refused"]:
        parts.append(
            "## Refused\n\nThe capture raises this error; generation goes on.\n\n" + _reasons(by_status["refused"])
        )
    if by_status["not-run"]:
        parts.append("## Could not be run here\n\nNothing is known of these.\n\n" + _reasons(by_status["not-run"]))
    TARGET.write_text("\n".join(part.rstrip("\n") + "\n" for part in parts))


def _is_reason(said: str) -> bool:
    return said.startswith("layer ")


def _said(row: dict[str, Any]) -> str:
    reasons = {said: name for name, said in row["blocks"].items() if _is_reason(said)}
    both = len(reasons) == 1 and all(_is_reason(said) for said in row["blocks"].values())
    return "; ".join(f"{'both' if both else f'`{name}`'}: {said}" for said, name in reasons.items())


STATUSES = ("pass", "wrong", "refused", "not-run")


def _table(rows: Iterable[dict[str, Any]]) -> str:
    lines = [
        "| family | class in vLLM | decoder layers | returns | checked by | error | router error | sum of blocks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        returns = {"hidden + residual": "sum", "hidden": "whole"}.get(row["convention"], row["convention"])
        runner = "" if row["runner"] == "V1" else f" ({row['runner']})"
        cells = [row["family"], row["vllm_class"] + runner, row.get("layer_class", ""), returns, row["check"]]
        lines.append(
            "| " + " | ".join([*cells, _number(row["error"]), _number(row.get("router_error")), _blocks(row)]) + " |"
        )
    return "\n".join(lines) + "\n"


def _blocks(row: dict[str, Any]) -> str:
    """Return the error of the sum of what blocks add, or that they are refused."""
    if "blocks" not in row:
        return ""
    return _number(max(row["sums"].values())) if row["sums"] else "refused"


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else "other width" if value >= 1e9 else f"{value:.1e}"


def _remarks(row: dict[str, Any]) -> str:
    remarks = [row.get("note", "")]
    if "against_hugging_face" in row:
        remarks.append(f"{row['reason']} (off by {row['against_hugging_face']:.1g} from it)")
    if "hugging_face" in row:
        remarks.append(f"transformers cannot run it: {row['hugging_face']}")
    return " ".join(remark for remark in remarks if remark)


def _reasons(rows: Iterable[dict[str, Any]]) -> str:
    lines = ["| family | class in vLLM | reason |", "|---|---|---|"]
    for row in rows:
        reason = " ".join(f"{row['reason']}{'; ' if row.get('note') else ''}{row.get('note', '')}".split()).replace(
            "|", "\\|"
        )
        lines.append(f"| {row['family']} | {row.get('vllm_class', '')} | {reason} |")
    return "\n".join(lines) + "\n"
