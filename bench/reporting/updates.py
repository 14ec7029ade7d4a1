"""Tables, goals and plots of the results of ``update_step.py``; ``report.py`` puts them into the README."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from support.rows import Row, read_folder

from reporting.tables import Goal, RowsByDevice, goal_table, headless_pyplot, mixed_sources

LABELS = {
    "ours": "**ours**",
    "repeated": "repeated batch",
    "repeated-one-tower": "repeated, tower once",
    "trl": "TRL",
    "prefix-grouper": "prefix grouping",
}
UNMEASURED = "*Not measured yet: `python bench/update_step.py`, then `python bench/report.py`.*"
SWEPT = {"group_size": "completions per prompt", "image_tokens": "image tokens", "completion": "tokens per completion"}
_BASE = {"size": "8m", "groups": 1, "group_size": 8, "image_tokens": 256, "completion": 64, "ragged": True}
WORTH_PREDICTING = 2.0
"""Above this predicted ratio, the measured ratio must reach ``LEAST_SHARE`` of the predicted one."""
LEAST_SHARE = 0.9


class UpdateResults(RowsByDevice):
    """Rows by device, case and provider; if several rows measure the same thing, the last one counts."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows: dict[tuple[str, str, str], Row] = {}
        for row in rows:
            # Removing the key first keeps rows in the order of their last measurement.
            key = (row["device"], row["case"], row["provider"])
            self.rows.pop(key, None)
            self.rows[key] = row

    @classmethod
    def load(cls, folder: Path) -> UpdateResults:
        """The results in all ``*.jsonl`` files of a folder."""
        return cls(read_folder(folder))

    def timed(self, device: str, case: str) -> dict[str, Row]:
        """The rows of a case by provider, without providers that were left out."""
        rows = {key[2]: row for key, row in self.rows.items() if key[:2] == (device, case)}
        return {name: rows[name] for name in LABELS if name in rows and "skipped" not in rows[name]}


def ratio(rows: dict[str, Row], slower: str, faster: str, field: str = "median_s") -> float | None:
    """``field`` of ``slower`` divided by ``field`` of ``faster``; None if one was not measured or the divisor is 0."""
    if slower not in rows or faster not in rows or not rows[faster].get(field) or rows[slower].get(field) is None:
        return None
    return rows[slower][field] / rows[faster][field]


def table(results: UpdateResults) -> str:
    """A table for each device with a row per case: times, measured and predicted ratio, and peak memory."""
    if not results.rows:
        return UNMEASURED
    parts: list[str] = []
    for device in results.devices:
        cases = results.lines(device)
        names = [name for name in LABELS if any(name in results.timed(device, case) for case in cases)]
        heads = ["case", *(LABELS[name] for name in names), "faster than repeated: measured", "predicted", "peak MiB"]
        lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        lines += [_line(results.timed(device, case), case, names) for case in cases]
        skipped = sorted({(k[2], r["skipped"]) for k, r in results.rows.items() if k[0] == device and "skipped" in r})
        parts += [_provenance(results, device), "", *lines, ""]
        parts += [f"- {name}: left out, {reason}" for name, reason in skipped]
    return "\n".join(parts).strip()


def _line(rows: dict[str, Row], case: str, names: list[str]) -> str:
    fastest = min((row["median_s"] for row in rows.values()), default=0.0)
    cells = [case]
    for name in names:
        text = f"{rows[name]['median_s']:.3g}" if name in rows else ""
        cells.append(f"**{text}**" if name in rows and rows[name]["median_s"] == fastest else text)
    measured = ratio(rows, "repeated", "ours")
    cells.append("" if measured is None else f"{measured:.2f}")
    cells.append(f"{rows['ours']['predicted_ratio']:.2f}" if "ours" in rows else "")
    peaks = [rows[name]["peak_bytes"] for name in ("ours", "repeated") if name in rows and rows[name]["peak_bytes"]]
    cells.append(" of ".join(f"{peak / 2**20:.0f}" for peak in peaks))
    return "| " + " | ".join(cells) + " |"


def _provenance(results: UpdateResults, device: str) -> str:
    rows = [row for key, row in results.rows.items() if key[0] == device]
    first = rows[-1]
    packages = ", ".join(f"{name} {first[name]}" for name in ("torch", "trl") if first.get(name))
    return (
        f"Seconds from rollouts to gradients, medians; {first['dtype']}, {device}, {first['threads']} threads; {packages}; "
        f"commit {str(first['commit'])[:7]}, {first['time'][:10]}. Case: parameters, groups B, completions per prompt G, image "
        "tokens, tokens per completion (~: ragged). Peak: ours of the repeated batch's, beyond weights and gradients."
    ) + mixed_sources(rows)


def goals(results: UpdateResults) -> list[Goal]:
    """The goals of the updates that were measured."""
    found: list[Goal] = []
    for device in results.devices:
        goals_here: list[Goal] = []
        shares: list[tuple[float, str]] = []
        for case in results.lines(device):
            rows = results.timed(device, case)
            measured = ratio(rows, "repeated", "ours")
            if measured is None:
                continue
            if rows["ours"]["acceptance"]:
                goals_here += _acceptance(rows, case)
            if rows["ours"]["predicted_ratio"] > WORTH_PREDICTING:
                shares.append((measured / rows["ours"]["predicted_ratio"], case))
        if shares:
            least, case = min(shares)
            what = f"least share of the predicted ratio above {WORTH_PREDICTING:g}, over {len(shares)} cases ({case})"
            goals_here.append((what, least, "at least", LEAST_SHARE))
        goals_here += _choices(results, device)
        where = f", {device}" if len(results.devices) > 1 else ""
        found += [(f"{what}{where}", *rest) for what, *rest in goals_here]
    return found


def _acceptance(rows: dict[str, Row], case: str) -> list[Goal]:
    bounds = [
        ("times faster than the repeated batch", ratio(rows, "repeated", "ours"), "at least", 4.5),
        ("times faster than TRL's update", ratio(rows, "trl", "ours"), "at least", 4.0),
        ("peak memory over the repeated batch's", ratio(rows, "ours", "repeated", "peak_bytes"), "at most", 0.35),
    ]
    return [(f"{case}: {what}", value, how, bound) for what, value, how, bound in bounds if value is not None]


def _choices(results: UpdateResults, device: str) -> list[Goal]:
    """The goal for ``auto``: time of the layout that it chooses, divided by the time of the faster layout, in the worst
    case."""
    worst: tuple[float, str] | None = None
    for case in results.lines(device):
        rows = results.timed(device, case)
        if "ours" not in rows or "repeated-one-tower" not in rows:
            continue
        chosen = "ours" if rows["ours"]["auto_shares"] else "repeated-one-tower"
        best = min(rows[name]["median_s"] for name in ("ours", "repeated-one-tower"))
        loss = rows[chosen]["median_s"] / best
        worst = max(worst or (0.0, ""), (loss, case))
    return (
        []
        if worst is None
        else [(f"time of `auto` over the faster layout's, at worst ({worst[1]})", worst[0], "at most", 1.05)]
    )


def acceptance(results: UpdateResults) -> str:
    """The table of goals and measured values, including the goals that are missed."""
    return goal_table("goal", goals(results), UNMEASURED)


def block(results: UpdateResults, plots: Iterable[str]) -> str:
    """The README block: the goals, links to the plots, and the tables in a collapsed section."""
    if not results.rows:
        return UNMEASURED
    images = [f"![one update: ours beside the others]({link})" for link in plots]
    fold = f"<details><summary>All cases, those that ours loses among them</summary>\n\n{table(results)}\n\n</details>"
    return "\n\n".join([acceptance(results), *images, fold])


# The plot.


def drawn_points(results: UpdateResults, device: str) -> list[tuple[str, str, float, float]]:
    """The plot's points, sorted: (swept quantity, name of the line, value of the swept quantity, times faster than the
    repeated batch).

    A line is a provider's name or ``predicted``.
    """
    found: list[tuple[str, str, float, float]] = []
    for swept in SWEPT:
        for case in results.lines(device):
            rows = results.timed(device, case)
            row = rows.get("repeated")
            if row is None or any(row[name] != value for name, value in _BASE.items() if name != swept):
                continue
            for name in rows:
                value = ratio(rows, "repeated", name)
                if value is not None and name != "repeated":
                    found.append((swept, name, row[swept], value))
            if "ours" in rows:
                found.append((swept, "predicted", row[swept], rows["ours"]["predicted_ratio"]))
    return sorted(found)


def swept_devices(results: UpdateResults) -> list[str]:
    """The devices that have something to draw."""
    return [device for device in results.devices if drawn_points(results, device)]


def draw(results: UpdateResults, device: str, path: Path, metadata: dict[str, str]) -> None:
    """Draws how many times faster than the repeated batch each provider is, in one panel for each swept quantity."""
    pyplot = headless_pyplot()
    points = drawn_points(results, device)
    figure, panels = pyplot.subplots(1, len(SWEPT), figsize=(11, 3.6), sharey=True, layout="constrained")
    for axes, (swept, label) in zip(panels, SWEPT.items(), strict=True):
        for name in ("predicted", *LABELS):
            line = [(x, y) for what, each, x, y in points if (what, each) == (swept, name)]
            if not line:
                continue
            style = {"ls": "--", "color": "grey"} if name == "predicted" else {"marker": "o"}
            title = "ours, predicted" if name == "predicted" else LABELS[name].strip("*")
            axes.plot(*zip(*line, strict=True), label=title, **style)
        axes.axhline(1.0, color="black", lw=0.8, ls=":")
        axes.set_xscale("log", base=2)
        axes.set_xlabel(label)
    panels[0].set_ylabel("times faster than the repeated batch")
    panels[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata=metadata)
    pyplot.close(figure)
