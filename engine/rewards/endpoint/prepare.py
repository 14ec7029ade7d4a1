"""Work done once per data set: reference units (``balcaprl prepare``) and better references (``balcaprl recaption``).

Both can be stopped and run again: results are appended as they come, and only those that are missing are asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from balcaprl.config import TrainConfig
from balcaprl.data import load_dataset
from balcaprl.data.datasets import RecordSource
from balcaprl.data.records.records import Record
from balcaprl.files.ownership import (
    ForeignPathError,
    claim_file,
    clear_partial_files,
    refuse_foreign_file,
    write_atomically,
)
from balcaprl.rewards.endpoint.judge import EndpointJudge
from balcaprl.rewards.endpoint.protocol import TASKS, Call, DecomposeReply, RecaptionReply, Reply
from balcaprl.rewards.endpoint.reference_units import (
    UnitStore,
    begins_with,
    judge_model,
    open_for_append,
    reference_digest,
    units_path,
)
from balcaprl.rewards.endpoint.server.redaction import redact
from balcaprl.rewards.endpoint.server.refusals import CallRefusedError, RefusalLog, refusals_path
from balcaprl.types import Sample

logger = logging.getLogger(__name__)

_MARK = "recaption_of"
"""First key of each line that ``recaption`` writes; readers of data sets ignore it."""


@dataclass
class PrepareReport:
    """What ``prepare`` or ``recaption`` did."""

    path: Path
    num_present: int = 0
    """Results found from an earlier run."""
    num_done: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Reason -> number of records that failed for it; run the command again to try them again."""
    num_refused: int = 0
    """Failed records that can never succeed, because of their picture or text; they are not asked for again."""
    refusals: Path | None = None
    """File that keeps the refused calls."""
    metrics: dict[str, float] = field(default_factory=dict)
    log: RefusalLog = field(default_factory=RefusalLog, repr=False)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.num_done:,} done, {self.num_present:,} were there, {self.errors.total():,} failed"
        ]
        lines += [f"  {error}: {count:,}" for error, count in self.errors.most_common(5)]
        if self.num_refused:
            lines.append(
                f"  {self.num_refused:,} of them for good, see {self.refusals}; remove it to ask for them again"
            )
        tokens = self.metrics.get("judge/prompt_tokens", 0), self.metrics.get("judge/completion_tokens", 0)
        lines.append(f"  {tokens[0]:,.0f} prompt and {tokens[1]:,.0f} completion tokens, cost {self._cost:.4g}")
        return "\n".join(lines)

    @property
    def _cost(self) -> float:
        return self.metrics.get("judge/cost", 0.0)


def prepare_units(config: TrainConfig) -> PrepareReport:
    """Take each reference of the data set apart once; write the units beside the data set, or to ``endpoint.units``.

    Raises:
        ValueError: the data have no file, or the endpoint is not configured.
        ForeignPathError: the file exists and holds something else.
        PathInUseError: another process writes the file.
        JudgeStoppedError: the judge cannot go on; the results so far are kept.
    """
    if config.data.path is None:
        raise ValueError(
            f"data.path: data.kind {config.data.kind} has no file to put units beside; none need be prepared"
        )
    path = config.endpoint.units or units_path(config.data.path)
    with claim_file(path, option="endpoint.units"):
        return _prepare_units(config, UnitStore(path, judge_model(config.reward.protocol, config.endpoint)))


def _prepare_units(config: TrainConfig, store: UnitStore) -> PrepareReport:
    store.refuse_foreign("endpoint.units")  # fails before any call is made
    references = list(dict.fromkeys(record.reference for record, _ in _records(config)))
    missing = [reference for reference in references if store.get(reference) is None]
    report = PrepareReport(store.path, len(references) - len(missing))
    limit = config.reward.protocol.max_caption_chars

    def keep(reference: str, reply: Reply | Exception) -> None:
        if isinstance(reply, DecomposeReply):
            store.add(reference, tuple(dict.fromkeys(reply.units)), store.model or "")
            report.num_done += 1
        else:
            _note_error(report, f"reference {reference_digest(reference)[:12]}", reply, reference)

    try:
        _run(
            report,
            ((r, partial(Call, TASKS["decompose"], {"reference": r[:limit]})) for r in missing),
            keep,
            _judge(config, report),
        )
    finally:
        store.close()
    return report


def recaption(config: TrainConfig, out: Path) -> PrepareReport:
    """Rewrite every reference from its image and the old reference, and write a data set of kind ``jsonl``.

    Image paths stay relative to the same ``data.image_root``. Each line begins with a digest of the record that was
    rewritten. By this digest the command recognises its own file, and asks again for records whose image name or
    reference has changed since. When all records are done or refused, the file is put in the data set's order. Lines of
    records that the data set does not hold are kept after the others.

    Raises:
        ValueError: the data have no image files, or the endpoint is not configured.
        ForeignPathError: ``out`` is the data set itself, or exists and was not written by this command.
        PathInUseError: another process writes the file.
        JudgeStoppedError: the judge cannot go on; the results so far are kept.
    """
    if config.data.kind not in ("jsonl", "sharegpt4v"):
        raise ValueError(
            f"data.kind: {config.data.kind} has no image files to refer to; recaption takes jsonl and sharegpt4v"
        )
    out = Path(os.path.realpath(out))  # the final write replaces a link's target, not the link
    if config.data.path is not None and out.exists() and os.path.samefile(out, config.data.path):
        raise ForeignPathError(f"--out: {out} is the data set that is read (data.path); name another file")
    with claim_file(out, option="--out"):
        refuse_foreign_file(out, _is_recaption, what="output of recaption", option="--out")
        clear_partial_files(out.parent, lambda name: name == out.name)
        return _recaption(config, out)


def _recaption(config: TrainConfig, out: Path) -> PrepareReport:
    records = {record.sample_id: (record, sample) for record, sample in _records(config)}
    embedded = sum(not isinstance(record.image, str) for record, _ in records.values())
    if embedded:
        raise ValueError(
            f"data.path: {embedded:,} records hold their images themselves, and recaption writes paths: save them as files"
        )
    file = open_for_append(out)
    written = _written(out)
    missing = {i: pair for i, pair in records.items() if written.get(i) != _digest(pair[0])}
    report = PrepareReport(out, len(records) - len(missing))
    strangers = len(written.keys() - records.keys())
    if strangers:
        logger.warning("%s: %d records are not in %s; they are kept", out, strangers, config.data.path)
    judge_limit = config.reward.protocol.max_caption_chars

    def keep(sample_id: str, reply: Reply | Exception) -> None:
        record = records[sample_id][0]
        if isinstance(reply, RecaptionReply):
            file.write(_line(record, reply.caption.strip()))
            report.num_done += 1
        else:
            _note_error(report, sample_id, reply, record.reference)

    def call_of(judge: EndpointJudge, sample: Sample) -> Call:
        return Call(TASKS["recaption"], {"reference": sample.reference[:judge_limit]}, judge.encode(sample))

    try:
        with_judge = _judge(config, report)
        calls = ((sample_id, partial(call_of, with_judge, sample)) for sample_id, (_, sample) in missing.items())
        _run(report, calls, keep, with_judge)
        os.fsync(file.fileno())
    finally:
        file.close()
    if report.errors.total() == report.num_refused:  # no more results will come
        _put_in_order(out, list(records))
    return report


def _records(config: TrainConfig) -> Iterator[tuple[Record, Sample]]:
    """Yield all usable records with their samples in the file's order, including those that training holds out."""
    source = load_dataset(config.data.model_copy(update={"num_eval": 0}), seed=config.seed).train
    assert isinstance(source, RecordSource)  # the callers have refused drawn scenes, which have no files
    for index, record in enumerate(source.records):
        yield record, source[index]


def _judge(config: TrainConfig, report: PrepareReport) -> EndpointJudge:
    report.refusals = refusals_path(report.path)
    return EndpointJudge(config.reward, config.endpoint, refusals_path=report.refusals)


def _run(
    report: PrepareReport,
    calls: Iterator[tuple[str, Callable[[], Call]]],
    keep: Callable[[str, Reply | Exception], None],
    judge: EndpointJudge,
) -> None:
    try:
        judge.run_calls(calls, keep)
    finally:
        report.metrics = judge.take_metrics()
        judge.close()


def _note_error(report: PrepareReport, name: str, error: Reply | Exception, reference: str) -> None:
    report.errors[redact(str(error), [reference])] += 1
    if isinstance(error, CallRefusedError):
        report.num_refused += 1
        report.log.note(name, error)


def _digest(record: Record) -> str:
    """Digest of what a recaption is made from: the image's name and the old reference."""
    return hashlib.sha256(f"{record.image}\0{record.reference}".encode("utf-8", "replace")).hexdigest()[:32]


def _line(record: Record, reference: str) -> bytes:
    plain = {
        _MARK: _digest(record),
        "id": record.sample_id,
        "image": record.image,
        "reference": reference,
        "instruction": record.instruction,
    }
    if record.facts is not None:
        plain["facts"] = record.facts
    return json.dumps(plain, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _is_recaption(head: bytes) -> bool:
    return begins_with(head, (_MARK, "id"))


def _read(line: bytes) -> tuple[str, str] | None:
    """Id and digest in a line that ``recaption`` wrote; None for any other line."""
    try:
        plain = json.loads(line)
        return str(plain["id"]), str(plain[_MARK])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _written(path: Path) -> dict[str, str]:
    """The digests of the records that the file holds, by id; the last line of an id counts."""
    written: dict[str, str] = {}
    if path.is_file():
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                found = _read(line)
                if found is None:
                    logger.warning("%s: line %d is broken, and left as it is", path, number)
                else:
                    written[found[0]] = found[1]
    return written


def _put_in_order(path: Path, ids: list[str]) -> None:
    """Rewrite the file, whole or not at all: one line for each of ``ids`` in their order, then all other lines."""
    lines: dict[str, bytes] = {}
    others = []
    known = set(ids)
    with open(path, "rb") as file:
        for line in file:
            found = _read(line)
            if found is not None and found[0] in known:
                lines[found[0]] = line
            else:
                others.append(line)
    write_atomically(path, [*(lines[sample_id] for sample_id in ids if sample_id in lines), *others])
