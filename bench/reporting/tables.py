"""What the tables and goals of all measurements share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from support.rows import Row

Goal = tuple[str, float, str, float]
"""(what, value, "at most" or "at least", bound) of a goal that was measured."""


class RowsByDevice:
    """Rows by device and two more keys."""

    rows: dict[tuple[str, Any, Any], Row]

    @property
    def devices(self) -> list[str]:
        return list(dict.fromkeys(key[0] for key in self.rows))

    def lines(self, device: str) -> list[Any]:
        """The distinct values of the first of the two keys on a device."""
        return list(dict.fromkeys(key[1] for key in self.rows if key[0] == device))


def number(value: float | None) -> str:
    """Formats ``value`` with three significant digits, and large values without powers of ten."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table whose first column is text."""
    return [
        "| " + " | ".join(heads) + " |",
        "|---|" + "---:|" * (len(heads) - 1),
        *("| " + " | ".join(r) + " |" for r in rows),
    ]


def goal_cells(goals: Iterable[Goal], show: Callable[[float], str] = "{:.3g}".format) -> list[list[str]]:
    """The rows of the table of goals and measured values, including the goals that are missed."""
    found = []
    for what, value, relation, bound in goals:
        holds = value <= bound if relation == "at most" else value >= bound
        found.append([what, show(value), f"{relation} {bound:.3g}", "holds" if holds else "**missed**"])
    return found


def goal_table(head: str, goals: Iterable[Goal], unmeasured: str) -> str:
    """The table of goals, whose first column has the heading ``head``; ``unmeasured`` if there are no goals."""
    rows = goal_cells(goals)
    if not rows:
        return unmeasured
    lines = [f"| {head} | measured | bound | |", "|---|---:|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def mixed_sources(rows: Iterable[Row]) -> str:
    """The sentence that ends a provenance if the rows were not all measured on the same sources, otherwise ''."""
    several = len({row["sources"] for row in rows}) > 1
    return " The rows were not all taken on the same sources." if several else ""


def headless_pyplot() -> Any:
    """``matplotlib.pyplot`` without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
