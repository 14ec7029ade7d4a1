"""Writes the READMEs' tables and the plots from the committed results, so that nothing in them is typed by hand.

python bench/report.py            # rewrite the blocks between the markers, and the plots of bench/plots/
python bench/report.py --check    # exit status 1 if a README or a plot does not agree with the results

A block is the text between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``. If several rows measure the same
thing, the last one counts. Where a goal leaves little room for noise, ``bench/results/repeats/`` has further runs of
its case on the same sources, and the goal applies to the median of all runs::

    python bench/run.py --op linear_policy_loss --case "1024x256x8192x8 float32" --provider native --provider gemms \
        --repeat 5 --output bench/results/repeats/cpu.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from reporting import ops, steps, updates
from reporting.ops import Results
from reporting.steps import Table
from reporting.updates import UpdateResults
from support.rows import RESULTS

ROOT = Path(__file__).resolve().parents[1]
PLOTS = ROOT / "bench" / "plots"
PLOT_KEY = "Description"  # the PNG text field that holds the digest of what was drawn


def blocks(results: Results) -> dict[tuple[str, str], str]:
    """The content of every block, by README and name; ``results`` are those of the ops."""
    measured = updates_measured()
    links = [update_plot_path(device).relative_to(ROOT).as_posix() for device in updates.swept_devices(measured)]
    return {
        ("README.md", "headline"): ops.headline(results),
        ("kernels/README.md", "acceptance"): ops.acceptance(results),
        ("kernels/README.md", "tables"): ops.tables(results),
        ("README.md", "update_step"): updates.block(measured, links),
        ("README.md", "sync"): steps.sync_block(Table.load(RESULTS / "sync", "size", "way")),
        ("README.md", "train_step"): steps.step_block(Table.load(RESULTS / "train_step", "pixels", "provider")),
    }


def with_block(text: str, name: str, content: str) -> str:
    """``text`` with a block's content replaced.

    Raises:
        ValueError: ``text`` does not have each marker exactly once and in order.
    """
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{name}: expected one {begin} and one {end} after it")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    return f"{before}{begin}\n{content}\n{end}{after}"


def rendered(results: Results, root: Path = ROOT) -> dict[Path, str]:
    """The text that every README should have."""
    texts: dict[Path, str] = {}
    for (file, name), content in blocks(results).items():
        path = root / file
        texts[path] = with_block(texts.get(path) or path.read_text("utf-8"), name, content)
    return texts


def updates_measured() -> UpdateResults:
    """The committed results of ``update_step.py``."""
    return UpdateResults.load(RESULTS / "update_step")


def update_plot_path(device: str) -> Path:
    """The plot's path for one processor or GPU, by its name."""
    name = "".join(c if c.isalnum() else "_" for c in device.lower())
    return PLOTS / f"update_step_{name}.png"


# The plots.


@dataclass(frozen=True)
class Plot:
    """A plot that the results call for."""

    path: Path
    points: list[Any]
    """What is drawn."""
    draw: Callable[[Path, dict[str, str]], None]
    """Draws it to a path, with fields of text for the file."""

    @property
    def digest(self) -> str:
        """A short hash of what is drawn, which the file carries."""
        return hashlib.sha256(json.dumps(self.points).encode()).hexdigest()[:16]


def plots(results: Results) -> list[Plot]:
    """The plots of the ops and of the updates."""
    measured = updates_measured()
    of_ops = [
        Plot(PLOTS / ops.plot_name(device), rows, partial(ops.draw, results, device))
        for device in results.devices
        if (rows := ops.drawn_rows(results, device))
    ]
    of_updates = [
        Plot(update_plot_path(device), updates.drawn_points(measured, device), partial(updates.draw, measured, device))
        for device in updates.swept_devices(measured)
    ]
    return of_ops + of_updates


def differences(results: Results, root: Path = ROOT) -> list[str]:
    """One sentence for each README and plot that does not agree with the results."""
    found = [
        f"{path.relative_to(root)}: not what bench/results says; run python bench/report.py"
        for path, text in rendered(results, root).items()
        if path.read_text("utf-8") != text
    ]
    for plot in plots(results):
        if _drawn_digest(plot.path) != plot.digest:
            found.append(f"{plot.path.name}: not drawn from bench/results; run python bench/report.py")
    return found


def _drawn_digest(path: Path) -> str | None:
    from PIL import Image

    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get(PLOT_KEY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    results = Results.load()
    if arguments.check:
        wrong = differences(results)
        print("\n".join(wrong) or "README and plots agree with bench/results")
        sys.exit(bool(wrong))
    for path, text in rendered(results).items():
        path.write_text(text, encoding="utf-8")
    for plot in plots(results):
        plot.draw(plot.path, {PLOT_KEY: plot.digest})


if __name__ == "__main__":
    main()
