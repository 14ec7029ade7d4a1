"""Tables, goals and plot of the results of ``run.py``; ``report.py`` puts them into the READMEs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from support.rows import RESULTS, Row, read_folder

from reporting.tables import Goal, goal_table, headless_pyplot, mixed_sources

UNMEASURED = "*Not measured yet: `python bench/run.py`, then `python bench/report.py`.*"
MIB = 1 << 20
OURS = ("native", "triton")
LIGER = ("liger", "liger-whole")
PROVIDERS = ("native", "triton", "reference", "gemms", "eager", "compile", "trl", "nvlabs", *LIGER)
LABELS = {"gemms": "bare GEMMs", "trl": "TRL", "nvlabs": "NVlabs", "liger": "Liger", "liger-whole": "Liger, one chunk"}
Key = tuple[str, str, str, str, str]


class Results:
    """The measured rows by device, op, case, provider and pass."""

    def __init__(self, rows: Iterable[Row], repeats: Iterable[Row] = ()) -> None:
        self.rows: dict[Key, Row] = {_key(row): row for row in rows}
        self._repeats = [row for row in repeats if "direction" in row]

    @classmethod
    def load(cls, folder: Path = RESULTS) -> Results:
        """The results in all ``*.jsonl`` files of a folder, and of its subfolder ``repeats``."""
        return cls(read_folder(folder), read_folder(folder / "repeats"))

    @property
    def devices(self) -> list[str]:
        return sorted({key[0] for key in self.rows})

    def ops(self, device: str) -> list[str]:
        """The ops measured on a device, in the order of the file."""
        return list(dict.fromkeys(key[1] for key in self.rows if key[0] == device))

    def cases(self, device: str, op: str) -> list[str]:
        return list(dict.fromkeys(key[2] for key in self.rows if key[:2] == (device, op)))

    def providers(self, device: str, op: str) -> list[str]:
        """The providers that were timed at least once on an op, in the order of ``PROVIDERS``."""
        timed = {key[3] for key in self.rows if key[:2] == (device, op) and key[4] != "skipped"}
        return [name for name in PROVIDERS if name in timed]

    def get(self, device: str, op: str, case: str, provider: str, direction: str) -> Row | None:
        return self.rows.get((device, op, case, provider, direction))

    def ratios(self, device: str, op: str, case: str, part: str, whole: str) -> list[float]:
        """Ratios of ``part``'s time to ``whole``'s: one for each run, repeats included, on the same sources, device and
        threads as the last row."""
        last = self.get(device, op, case, part, "both")
        if last is None or self.get(device, op, case, whole, "both") is None:
            return []
        runs: dict[str, dict[str, float]] = {}
        for row in (*self.rows.values(), *self._repeats):
            same = _key(row)[:3] == (device, op, case) and row.get("direction") == "both"
            if same and all(row[name] == last[name] for name in ("sources", "device", "threads")):
                runs.setdefault(row["time"], {})[row["provider"]] = row["median_ms"]
        return [run[part] / run[whole] for run in runs.values() if part in run and whole in run]

    def best(self, device: str, op: str, case: str, providers: Iterable[str], direction: str = "both") -> Row | None:
        """The row of the fastest of ``providers``, or None if there is no row."""
        rows = [r for name in providers if (r := self.get(device, op, case, name, direction)) is not None]
        return min(rows, key=lambda row: row["median_ms"], default=None)


def _key(row: Row) -> Key:
    return row["device_type"], row["op"], row["case"], row["provider"], row.get("direction", "skipped")


# The text of the tables.


def milliseconds(value: float) -> str:
    """Formats ``value`` with three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def total_direction(results: Results, device: str, op: str) -> str:
    """The pass that the tables show: ``both`` if the op has gradients, otherwise ``forward``."""
    return "both" if any(k[:2] == (device, op) and k[4] == "both" for k in results.rows) else "forward"


def provenance(results: Results, device: str) -> str:
    """One or two sentences on the machine, packages and commits that the figures come from."""
    rows = [row for key, row in results.rows.items() if key[0] == device]
    first = rows[0]
    names = ("torch", "trl", "liger-kernel") if device == "cpu" else ("torch", "triton", "trl", "liger-kernel")
    packages = ", ".join(f"{name} {first[name]}" for name in names if first.get(name))
    commits = sorted({str(row["commit"])[:7] for row in rows})
    place = f"{first['device']}, {first['threads']} threads" + (f", {first['simd']}" if first.get("simd") else "")
    changed = " with changes" if any(row.get("modified") for row in rows) else ""
    text = f"{place}; {packages}; commit {', '.join(commits)}{changed}, {first['time'][:10]}."
    return text + mixed_sources(rows)


def op_table(results: Results, device: str, op: str) -> list[str]:
    """The table of one op: a row per case, a column per provider."""
    direction = total_direction(results, device, op)
    providers = results.providers(device, op)
    ceiling = "gemms" in providers
    columns = [p for p in providers if p != "gemms"]
    heads = ["case", *(LABELS.get(p, f"**{p}**" if p in OURS else p) for p in columns)]
    heads += ["bare GEMMs", "of the GEMMs' speed"] if ceiling else ["of a copy's speed"]
    heads += ["peak MiB: ours", "least of the others"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for case in results.cases(device, op):
        rows = {p: results.get(device, op, case, p, direction) for p in providers}
        if all(row is None for row in rows.values()):
            continue
        timed = {p: row for p, row in rows.items() if row is not None}
        fastest = min((row["median_ms"] for p, row in timed.items() if p != "gemms"), default=0.0)
        cells = [case_label(next(iter(timed.values())))]
        for name in columns:
            row = timed.get(name)
            text = "" if row is None else milliseconds(row["median_ms"])
            cells.append(f"**{text}**" if row is not None and row["median_ms"] == fastest else text)
        ours = next((timed[p] for p in OURS if p in timed), None)
        percent = ours and ours["percent_of_ceiling"]
        if ceiling:
            cells.append(milliseconds(timed["gemms"]["median_ms"]) if "gemms" in timed else "")
        cells.append("" if not percent else f"{percent:.0f}%")
        others = [r["peak_bytes"] for p, r in timed.items() if p not in (*OURS, "reference", "gemms")]
        cells.append(megabytes(None if ours is None else ours["peak_bytes"]))
        cells.append(megabytes(min((b for b in others if b is not None), default=None)))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / MIB:.1f}"


def case_label(row: Row) -> str:
    return f"{row['case']}" + (f" ({row['what']})" if row["what"] else "")


def tables(results: Results) -> str:
    """The tables of every op on every device, and the providers that could not run."""
    if not results.rows:
        return UNMEASURED
    parts: list[str] = []
    for device in results.devices:
        parts += [provenance(results, device) + " Medians in ms; quartiles are in `bench/results/`.", ""]
        if drawn_rows(results, device):
            parts += [f"![linear_policy_loss beside its peers](../bench/plots/{plot_name(device)})", ""]
        for op in results.ops(device):
            direction = total_direction(results, device, op)
            kind = "forward and gradients" if direction == "both" else "forward"
            names = "x".join(n.removeprefix("size_") for n in first_row(results, device, op) if n.startswith("size_"))
            parts += [f"**`{op}`**, {kind}, cases {names}:", "", *op_table(results, device, op), ""]
        skipped = {
            (key[1], key[3], row["skipped"])
            for key, row in results.rows.items()
            if key[0] == device and key[4] == "skipped" and "runs on" not in row["skipped"]
        }
        parts += [f"- `{op}`, {provider}: left out, {reason}" for op, provider, reason in sorted(skipped)]
    return "\n".join(parts).strip()


def first_row(results: Results, device: str, op: str) -> Row:
    return next(row for key, row in results.rows.items() if key[:2] == (device, op))


def headline(results: Results) -> str:
    """The table of the fused loss beside its peers, for the main README."""
    op = "linear_policy_loss"
    lines: list[str] = []
    for device in results.devices:
        cases = [c for c in results.cases(device, op) if results.best(device, op, c, OURS) is not None]
        shown = [c for c in cases if results.get(device, op, c, "gemms", "both") is not None]
        if not shown:
            continue
        lines += [
            "| hidden states to loss and gradients | ours | bare GEMMs | eager | TRL | Liger | peak memory: ours, TRL |"
        ]
        lines += ["|---|---:|---:|---:|---:|---:|---:|"]
        for case in shown:
            ours = results.best(device, op, case, OURS)
            assert ours is not None
            others = [results.best(device, op, case, p) for p in (("gemms",), ("eager",), ("trl",), LIGER)]
            trl = others[2]
            cells = [case_label(ours), *("" if r is None else milliseconds(r["median_ms"]) for r in (ours, *others))]
            cells.append(", ".join(megabytes(r and r["peak_bytes"]) for r in (ours, trl)) + " MiB")
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", f"ms, {provenance(results, device)}", ""]
    return "\n".join(lines).strip() or UNMEASURED


# The goals of the kernels, on two cores.

_SMALL = "1024x256x8192x8 float32"
_MIDDLE = "512x896x32768x8 float32"
_LARGE = "128x2048x151936x8 bfloat16"
_FILTERED = "512x896x32768x8 float32 peaked eps0.000244"


def goals(results: Results) -> list[Goal]:
    """The goals of the kernels that were measured."""
    found: list[Goal] = []

    def get(op: str, case: str, provider: str, name: str = "median_ms", direction: str = "both") -> float | None:
        row = results.get("cpu", op, case, provider, direction)
        return None if row is None else row[name]

    def add(what: str, part: float | None, whole: float | None, relation: str, bound: float) -> None:
        if part is not None and whole:
            found.append((what, part / whole, relation, bound))

    head = "linear_policy_loss"
    for case, limit, factor in ((_SMALL, 1.15, 1.5), (_MIDDLE, 1.10, 1.5), (_LARGE, 1.05, 3.0)):
        ours = get(head, case, "native")
        liger, best = get(head, case, "liger"), results.best("cpu", head, case, LIGER)
        ratios = results.ratios("cpu", head, case, "native", "gemms")
        if ratios:
            several = f", median of {len(ratios)} runs from {min(ratios):.3g} to {max(ratios):.3g}"
            what = f"`{head}`, {case}: time over the bare GEMMs'" + several * (len(ratios) > 1)
            add(what, statistics.median(ratios), 1.0, "at most", limit)
        add(f"`{head}`, {case}: Liger's time over ours", liger, ours, "at least", factor)
        # This goal compares with the faster of Liger's two chunk sizes. One of them is not Liger's default, but ours
        # must not be slower than Liger with either.
        add(
            f"`{head}`, {case}: Liger's with its best chunk over ours",
            best and best["median_ms"],
            ours,
            "at least",
            1.0,
        )
    for case in results.cases("cpu", head):
        peak = get(head, case, "native", "peak_bytes")
        add(f"`{head}`, {case}: peak MiB beyond inputs and gradients", peak, MIB, "at most", 64.0)
    add(
        "filtered, peaked: time over the bare GEMMs'",
        get(head, _FILTERED, "native"),
        get(head, _FILTERED, "gemms"),
        "at most",
        0.6,
    )
    errors = [get(head, _FILTERED, "native", name) for name in ("gradient_error", "bfloat16_error")]
    add("filtered, peaked: error of the gradient over bfloat16's own", *errors, "at most", 1.0)
    rows = [get(head, f"{_MIDDLE} zero0.5", p, direction="backward") for p in ("native", "native-every-token")]
    add("half of the tokens without gradient: backward over the full one's", *rows, "at most", 0.6)
    rows = [get("grouped_advantages", "512x8x3 float32", p, direction="forward") for p in ("trl", "native")]
    add("`grouped_advantages`, 512x8x3: TRL's time over ours", *rows, "at least", 10.0)
    return found


def acceptance(results: Results) -> str:
    """The table of goals and measured values, including the goals that are missed."""
    return goal_table("goal on two cores", goals(results), UNMEASURED)


# The plot.


def plot_name(device: str) -> str:
    """The name of the plot's file."""
    return f"kernels_{device}.png"


def drawn_rows(results: Results, device: str) -> list[tuple[str, str, float, float, float]]:
    """The plot's rows (case, provider, low, median, high) of the fused loss, as multiples of the bare GEMMs' median."""
    op, found = "linear_policy_loss", []
    for case in results.cases(device, op):
        gemms = results.get(device, op, case, "gemms", "both")
        for name in results.providers(device, op) if gemms is not None else []:
            row = results.get(device, op, case, name, "both")
            if row is not None and name not in ("gemms", "reference"):
                values = [row[f"{k}_ms"] / gemms["median_ms"] for k in ("quartile_low", "median", "quartile_high")]
                found.append((case, name, *values))
    return found


def draw(results: Results, device: str, path: Path, metadata: dict[str, str]) -> None:
    """Draws bars of the fused loss relative to the bare GEMMs, with quartiles as whiskers."""
    pyplot = headless_pyplot()
    rows = drawn_rows(results, device)
    cases = list(dict.fromkeys(row[0] for row in rows))
    names = [p for p in PROVIDERS if any(row[1] == p for row in rows)]
    height = 0.8 / max(len(names), 1)
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.9 * len(cases)), layout="constrained")
    for offset, name in enumerate(names):
        bars = [(cases.index(row[0]) + offset * height, *row[2:]) for row in rows if row[1] == name]
        places, lows, medians, highs = zip(*bars, strict=True)
        whiskers = [
            [m - low for m, low in zip(medians, lows, strict=True)],
            [h - m for h, m in zip(highs, medians, strict=True)],
        ]
        axes.barh(places, medians, height, xerr=whiskers, label=LABELS.get(name, name), error_kw={"lw": 0.8})
    axes.axvline(1.0, color="black", lw=1, ls="--")
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(cases))], cases)
    axes.invert_yaxis()
    axes.set_xlabel("forward and gradients of linear_policy_loss: time over the three bare matrix products")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata=metadata)
    pyplot.close(figure)
