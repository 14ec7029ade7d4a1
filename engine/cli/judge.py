"""The commands about judges: ``prepare``, ``recaption``, ``judge-audit`` and ``judge-cache``."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ActionConfigFile, Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from balcaprl.cli.parser import Command, CommandParser, to_config, user_path
from balcaprl.config import EndpointConfig, TrainConfig
from balcaprl.files.ownership import claim_file, refuse_foreign_file, write_atomically

if TYPE_CHECKING:
    from balcaprl.rewards.audit import AuditReport, Interval

_AUDIT_MARK = {"written_by": "balcaprl judge-audit"}
"""First entry of an audit report. A file that begins with this entry may be replaced by a new report."""


def _run_parser(description: str) -> CommandParser:
    parser = CommandParser(description=description)
    parser.add_argument("--config", action=ActionConfigFile, help="a recipe in YAML")
    parser.add_class_arguments(TrainConfig)
    return parser


def _prepare_parser() -> CommandParser:
    return _run_parser(
        "Take each reference caption apart into units, into a file beside the data. Goes on where it stopped."
    )


def _recaption_parser() -> CommandParser:
    parser = _run_parser("Rewrite each reference caption from its image and its old text. Goes on where it stopped.")
    parser.add_argument("--out", type=user_path, required=True, help="data set of kind jsonl to write")
    return parser


def _audit_parser() -> CommandParser:
    parser = _run_parser("Compare a recipe's judge with the exact judge of drawn scenes.")
    parser.add_argument("--scenes", type=PositiveInt, default=50, help="drawn scenes")
    parser.add_argument("--captions", type=PositiveInt, default=4, help="captions of each")
    parser.add_argument("--retest", type=bool, default=True, help="judge everything twice, to see how stable it is")
    parser.add_argument("--out", type=user_path, default=None, help="also write the report to this JSON file")
    return parser


def _cache_parser() -> CommandParser:
    parser = CommandParser(description="Show what the reply cache holds; with a bound, prune it first.")
    parser.add_argument("--cache", type=user_path, default=EndpointConfig().cache, help="the cache file")
    parser.add_argument(
        "--max_mib", type=NonNegativeInt, default=None, help="drop the least recently used entries beyond this size"
    )
    parser.add_argument(
        "--unused_days", type=NonNegativeFloat, default=None, help="drop entries unused for so many days"
    )
    return parser


def _prepare(options: Namespace) -> int:
    """Run ``prepare``; return 0 if every reference was taken apart, otherwise 1."""
    from balcaprl.rewards.endpoint.prepare import prepare_units

    report = prepare_units(to_config(options.as_dict()))
    print(report)
    return 1 if report.errors else 0


def _recaption(options: Namespace) -> int:
    """Run ``recaption``; return 0 if every reference was rewritten, otherwise 1."""
    from balcaprl.rewards.endpoint.prepare import recaption

    plain = options.as_dict()
    out = plain.pop("out")
    report = recaption(to_config(plain), out)
    print(report)
    return 1 if report.errors else 0


def _audit(options: Namespace) -> int:
    """Run ``judge-audit`` and print its tables."""
    from balcaprl.rewards.audit import audit_config

    plain = options.as_dict()
    scenes, captions, retest, out = (plain.pop(name) for name in ("scenes", "captions", "retest", "out"))
    config = to_config(plain)
    if out is None:
        print_audit(
            audit_config(config, num_scenes=scenes, captions_per_scene=captions, seed=config.seed, retest=retest)
        )
        return 0
    with claim_file(out, option="--out"):
        # Check the file before the judge is asked anything: an audit costs time, and often money.
        refuse_foreign_file(out, _is_audit, what="report of judge-audit", option="--out")
        report = audit_config(config, num_scenes=scenes, captions_per_scene=captions, seed=config.seed, retest=retest)
        write_atomically(out, (json.dumps(_AUDIT_MARK | report.as_dict(), indent=2) + "\n").encode())
    print_audit(report)
    return 0


def _is_audit(head: bytes) -> bool:
    return head.startswith(json.dumps(_AUDIT_MARK, indent=2).encode().removesuffix(b"\n}"))


def print_audit(report: AuditReport) -> None:
    """Print the tables of an audit on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    verdicts = Table(title=f"judge {report.judge}: verdicts on {report.num_captions} captions (95% intervals)")
    for column in ("", "number", "not listed", "precision", "recall", "kappa"):
        verdicts.add_column(column, justify="left" if not column else "right")
    rows = {f"assertions: {name}": value for name, value in report.assertions.items()}
    if report.units is not None:
        rows["reference units"] = report.units
    for name, each in rows.items():
        cells = map(_shown, (each.precision, each.recall, each.kappa))
        verdicts.add_row(name, str(each.num), str(each.num_unjudged), *cells)
    console.print(verdicts)
    scores = Table(title="scores against the exact judge's")
    for column in ("", "correlation", "mean difference", "the same again"):
        scores.add_column(column, justify="left" if not column else "right")
    for name, correlation in report.correlation.items():
        again = report.retest.get(name, math.nan)
        shown = "" if math.isnan(again) else f"{again:.1%}"
        scores.add_row(name, _shown(correlation), _shown(report.difference[name]), shown)
    for name, kappa in report.grades.items():
        scores.add_row(f"{name} (weighted kappa)", _shown(kappa), "", "")
    scores.add_row("agreement", _shown(report.agreement), "", "")
    console.print(scores)
    tokens = report.metrics.get("judge/prompt_tokens", 0.0) + report.metrics.get("judge/completion_tokens", 0.0)
    number = max(1, report.num_captions)
    console.print(
        f"{report.num_unscored} captions without a score; {1e3 * report.seconds_per_caption:.1f} ms, "
        f"{tokens / number:,.0f} tokens and {report.metrics.get('judge/cost', 0.0) / number:.3g} a caption"
    )


def _shown(interval: Interval) -> str:
    value, low, high = interval
    return "-" if math.isnan(value) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _cache(options: Namespace) -> int:
    """Print what the cache holds, after pruning it if the options ask for that."""
    from balcaprl.rewards.endpoint.server.cache import ReplyCache

    path = Path(options.cache).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: no reply was cached yet, or --cache names another file")
    cache = ReplyCache(path, max_bytes=1 << 62)
    try:
        if options.max_mib is not None or options.unused_days is not None:
            bound = None if options.max_mib is None else options.max_mib << 20
            print(f"dropped {cache.prune(max_bytes=bound, unused_days=options.unused_days):,} entries")
        report = cache.report()
    finally:
        cache.close()
    print(f"{report.path}: {report.num_entries:,} replies, {report.file_bytes / 2**20:.1f} MiB on disk")
    for name, count in report.by_task.items():
        print(f"  {name}: {count:,}")
    if report.num_entries:
        print(f"  longest unused: {(time.time() - report.oldest) / 86_400:.1f} days")
    return 0


JUDGE_COMMANDS = {
    "prepare": Command(
        "take the references of a data set apart, once, by the judge model",
        _prepare_parser,
        _prepare,
        takes_config=True,
    ),
    "recaption": Command(
        "rewrite a data set's references by the judge model", _recaption_parser, _recaption, takes_config=True
    ),
    "judge-audit": Command(
        "measure a judge where the truth is known: quality, cost, latency", _audit_parser, _audit, takes_config=True
    ),
    "judge-cache": Command("show and prune the judge model's reply cache", _cache_parser, _cache),
}
