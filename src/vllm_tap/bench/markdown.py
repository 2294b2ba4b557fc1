"""Tables and figures of rendered documents."""

from __future__ import annotations


def three_digits(value: float) -> str:
    """Return a number with three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: list[list[str]]) -> str:
    """Return rows of cells as a table; the first is its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|" + "---|" * len(rows[0])
    return "\n".join([head, rule, *body])
