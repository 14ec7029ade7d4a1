"""Tables of the results of ``sync.py`` and ``train_step.py``; ``report.py`` puts them into the README."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support.rows import Row, read_folder

from reporting.tables import Goal, RowsByDevice, goal_cells, markdown, mixed_sources, number

WAYS = {"shared": "**shared**", "inplace": "**inplace**", "reload": "**reload**", "trl": "TRL's loop"}
PROVIDERS = {
    "ours": "**ours**",
    "ours-hf": "**ours**, sampled by transformers",
    "trl": "TRL",
    "trl-accumulated": "TRL, accumulated",
}
PHASES = ("sample", "score", "update", "sync")
UNMEASURED = {
    name: f"*Not measured yet: `python bench/{name}.py`, then `python bench/report.py`.*"
    for name in ("sync", "train_step")
}
MANY = 400e6
"""If a model has at least this many parameters, an ``inplace`` sync must reach ``LEAST_PERCENT`` of a copy's speed, and
``shared`` may hold at most ``MOST_COPIES`` copies of the weights."""
MOST_MS, LEAST_PERCENT, MOST_COPIES = 2.0, 60.0, 1.5
LARGE_IMAGE, LEAST_RATIO = 448, 3.0


class Table(RowsByDevice):
    """Rows by device and the values of two fields; if several rows measure the same thing, the last one counts."""

    def __init__(self, rows: Iterable[Row], across: str, down: str) -> None:
        self.rows = {(row["device"], row[across], row[down]): row for row in rows}

    @classmethod
    def load(cls, folder: Path, across: str, down: str) -> Table:
        """The rows of all ``*.jsonl`` files of a folder. Rows of other dtypes than float32 are left out, because they
        have no table yet."""
        rows = (row for row in read_folder(folder) if row.get("dtype", "float32") == "float32")
        return cls(rows, across, down)

    def measured(self, device: str, line: Any) -> dict[str, Row]:
        """The rows with value ``line`` of the first field, by the second field, without failures."""
        return {k[2]: r for k, r in self.rows.items() if k[:2] == (device, line) and "failed" not in r}

    def failures(self, device: str) -> list[str]:
        return [
            f"- {k[2]}, {k[1]}: failed, {r['failed']}" for k, r in self.rows.items() if k[0] == device and "failed" in r
        ]

    def provenance(self, device: str, packages: tuple[str, ...]) -> str:
        rows = [row for key, row in self.rows.items() if key[0] == device]
        versions = ", ".join(f"{name} {rows[-1][name]}" for name in packages if rows[-1].get(name))
        commits = ", ".join(sorted({str(row["commit"])[:7] for row in rows}))
        text = f"{device}, {rows[-1]['threads']} threads; {versions}; commit {commits}, {rows[-1]['time'][:10]}."
        return text + mixed_sources(rows)


def goal_lines(goals: list[Goal]) -> list[str]:
    """The table of goals and measured values, including the goals that are missed."""
    return markdown(["goal", "measured", "bound", ""], goal_cells(goals, number)) if goals else []


# The sync.


def sync_goals(table: Table) -> list[Goal]:
    """The goals of each device: the slowest shared sync, the bytes that shared syncs copy, and for large models the
    copies of the weights that ``shared`` holds and the speed of ``inplace``."""
    goals: list[Goal] = []
    for device in table.devices:
        shared = [r for k, r in table.rows.items() if k[0] == device and k[2] == "shared" and "failed" not in r]
        copied = [r for k, r in table.rows.items() if k[0] == device and k[2] == "inplace" and "failed" not in r]
        if shared:
            slowest = max(shared, key=lambda row: row["median_ms"])
            what = f"slowest `shared` sync, ms ({millions(slowest)} parameters)"
            goals.append((what, slowest["median_ms"], "at most", MOST_MS))
            goals.append(("bytes that `shared` copies", max(r["bytes_copied"] for r in shared), "at most", 0))
        for row in (r for r in shared if r["num_parameters"] >= MANY):
            what = f"copies of the weights in memory, `shared`, {millions(row)}"
            goals.append((what, row["weight_copies"], "at most", MOST_COPIES))
        for row in (r for r in copied if r["num_parameters"] >= MANY):
            what = f"percent of a plain copy's speed, `inplace`, {millions(row)}"
            goals.append((what, row["percent_of_copy_bandwidth"], "at least", LEAST_PERCENT))
    return goals


def millions(row: Row) -> str:
    return f"{row['num_parameters'] / 1e6:.3g} M"


def sync_time(row: Row) -> str:
    """The time of the whole sync; for ``reload`` also, in brackets, the time of the weights only, because vLLM's own
    call does no more than that."""
    return number(row["median_ms"]) + (f" ({number(row['push_ms'])})" if row["way"] == "reload" else "")


def sync_block(table: Table) -> str:
    """The README block of syncs: the goals, and for each size the time and the copies of the weights of each way."""
    if not table.rows:
        return UNMEASURED["sync"]
    parts = [*goal_lines(sync_goals(table)), ""]
    for device in table.devices:
        lines = [table.measured(device, size) for size in table.lines(device)]
        ways = [way for way in WAYS if any(way in line for line in lines)]
        heads = ["parameters", *(f"{WAYS[way]}, ms" for way in ways), "copies of the weights held: shared, inplace"]
        cells = []
        for line in (line for line in lines if line):
            held = [number(line[way]["weight_copies"]) for way in ("shared", "inplace") if way in line]
            times = [sync_time(line[way]) if way in line else "" for way in ways]
            cells.append([millions(next(iter(line.values()))), *times, ", ".join(held)])
        caption = (
            "Medians of whole syncs, checks included; in brackets vLLM's reload alone, without the probe after it. "
        )
        parts += [*markdown(heads, cells), "", caption + table.provenance(device, ("torch", "vllm", "trl")), ""]
        parts += [*table.failures(device), ""]
    return "\n".join(parts).strip()


# The whole step.


def step_goals(table: Table) -> list[Goal]:
    """The goal of each image size: our completions per second over those of the faster of TRL's two ways."""
    goals: list[Goal] = []
    for device in table.devices:
        for pixels in table.lines(device):
            rows = table.measured(device, pixels)
            trl = [rows[name]["completions_per_second"] for name in ("trl", "trl-accumulated") if name in rows]
            if "ours" in rows and trl:
                what = f"{pixels} x {pixels} pixels: completions per second over TRL's"
                least = LEAST_RATIO if pixels == LARGE_IMAGE else 1.0
                goals.append((what, rows["ours"]["completions_per_second"] / max(trl), "at least", least))
    return goals


def step_block(table: Table) -> str:
    """The README block of training steps: the goals, and the phases of each provider's step."""
    if not table.rows:
        return UNMEASURED["train_step"]
    parts = [*goal_lines(step_goals(table)), ""]
    for device in table.devices:
        cells = []
        for pixels in table.lines(device):
            rows = table.measured(device, pixels)
            cells += [step_cells(rows[name], label) for name, label in PROVIDERS.items() if name in rows]
        heads = ["pixels", "", "completions/s", "step, s", *PHASES, "rest", "peak GiB"]
        parts += [*markdown(heads, cells), "", step_caption(table, device), "", *table.failures(device), ""]
    return "\n".join(parts).strip()


def step_cells(row: Row, label: str) -> list[str]:
    """One line of the phase table; its ``rest`` column is the time outside of all phases."""
    phases = row["phases_s"]
    rest = max(0.0, row["median_s"] - sum(phases.get(name, 0.0) for name in PHASES))
    times = [number(phases.get(name)) for name in PHASES]
    first = [str(row["pixels"]), label, number(row["completions_per_second"]), number(row["median_s"])]
    return [*first, *times, number(rest), number(row["peak_resident_bytes"] / 2**30)]


def step_caption(table: Table, device: str) -> str:
    row = next(r for k, r in table.rows.items() if k[0] == device)
    size = ""
    if "failed" not in row:
        size = (
            f"{row['prompts']} prompts x {row['group_size']} completions of at most {row['max_tokens']} tokens a step. "
        )
    return f"Medians in seconds; {size}{table.provenance(device, ('torch', 'vllm', 'trl'))}"
