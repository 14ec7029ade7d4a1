"""The paper's rewards from a judge model behind OpenAI-compatible servers.

The judge is asked only for rewards that count: those of the three that have a weight or are in a condition, and the
custom rewards ``questions`` and ``rubric``. The calls about one image are made together, image after image; equal
captions share their calls. Each distinct caption has calls of its own, so that no reply can be taken for another
caption's. If a call fails, only its own component is missing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from balcaprl.config import EndpointConfig, RewardConfig
from balcaprl.rewards.background import BackgroundLoop
from balcaprl.rewards.endpoint.batch import CaptionState, EndpointBatch, GroupState
from balcaprl.rewards.endpoint.encoding import EncodedImage, encode_image
from balcaprl.rewards.endpoint.protocol import TASKS, Call, DecomposeReply, QuestionsReply, Reply, RubricReply, numbered
from balcaprl.rewards.endpoint.reference_units import UnitStore, judge_model, units_path
from balcaprl.rewards.endpoint.scores import (
    FactsError,
    breakdown_of,
    criteria_data,
    is_wordless,
    questions_data,
    questions_score,
    rubric_score,
    wordless_breakdown,
)
from balcaprl.rewards.endpoint.server.cache import ReplyCache
from balcaprl.rewards.endpoint.server.client import JudgeClient
from balcaprl.rewards.endpoint.server.refusals import (
    REFUSALS,
    CallFailedError,
    CallLeftOutError,
    RefusalLog,
    RefusalMemory,
)
from balcaprl.rewards.endpoint.server.usage import LEDGER, Ledger, Usage
from balcaprl.types import REWARD_NAMES, RewardBreakdown, Sample

_SURROGATES = re.compile("[\ud800-\udfff]")
_TASK_OF = {"precision": "verify", "recall": "match", "linguistic": "style"}
_NEED_UNITS = ("match", "combined")
_NEED_IMAGE = tuple(name for name, task in TASKS.items() if task.needs_image)


K = TypeVar("K")


class UnitSource(Protocol):
    """A source of prepared reference units."""

    def get(self, reference: str) -> tuple[str, ...] | None:
        """The units of a reference, or None if it was not taken apart."""
        ...


class EndpointJudge:
    """Scores captions with a judge model, in the background.

    Args:
        reward: the rewards and the protocol.
        endpoint: the servers and their limits.
        units: prepared reference units; units that are missing there are asked for.
        ledger_path: file that keeps the cost across restarts.
        refusals_path: file that keeps the refused and the failing calls across restarts.

    Raises:
        ValueError: servers, model or keys are not configured.
        ImportError: aiohttp or tenacity is not installed.
    """

    name = "endpoint"

    def __init__(
        self,
        reward: RewardConfig,
        endpoint: EndpointConfig,
        *,
        units: UnitSource | None = None,
        ledger_path: Path | None = None,
        refusals_path: Path | None = None,
    ) -> None:
        self._protocol, self._endpoint = reward.protocol, endpoint
        self._extra = {c.source: c.name for c in reward.custom if c.source in ("questions", "rubric")}
        conditioned = {name for c in reward.conditions for name in (c.reward, c.on)}
        pairs = zip(reward.names, reward.weights, strict=True)
        wanted = {name for name, weight in pairs if weight > 0} | conditioned
        tasks = [_TASK_OF[name] for name in REWARD_NAMES if name in wanted]
        if reward.protocol.calls == "combined" and len(tasks) > 1:
            tasks = ["combined"]
        self.tasks: tuple[str, ...] = (*tasks, *self._extra)
        """Names of the tasks that are asked about every caption."""
        self.client = JudgeClient(
            reward.protocol, endpoint, ledger=Ledger(endpoint, ledger_path), refusals=RefusalMemory(refusals_path)
        )
        if endpoint.cache is not None:
            self.client.cache = ReplyCache(endpoint.cache, endpoint.cache_max_mib << 20)
        self._units = units
        self._refusal_log = RefusalLog()
        self._loop = BackgroundLoop("judge")
        self._images = ThreadPoolExecutor(1, "judge-images")
        self._admission: asyncio.Lock | None = None
        self._places: asyncio.Semaphore | None = None

    @classmethod
    def from_config(
        cls, reward: RewardConfig, endpoint: EndpointConfig, *, data_path: Path | None, run_dir: Path | None
    ) -> EndpointJudge:
        """Create the judge of a run, with the units from ``endpoint.units`` or from the file beside its data.

        Raises:
            ValueError: for the reasons of the constructor, or because ``endpoint.units`` names no file.
        """
        path = endpoint.units
        if path is not None and not path.is_file():
            raise ValueError(f"endpoint.units: {path} does not exist; balcaprl prepare writes it")
        if path is None and data_path is not None and units_path(data_path).is_file():
            path = units_path(data_path)
        units = UnitStore(path, judge_model(reward.protocol, endpoint)) if path is not None else None
        kept = {} if run_dir is None else {"ledger_path": run_dir / LEDGER, "refusals_path": run_dir / REFUSALS}
        return cls(reward, endpoint, units=units, **kept)

    def score(self, sample: Sample, captions: Sequence[str]) -> list[RewardBreakdown]:
        """One breakdown per caption, in the order of the captions.

        Raises:
            JudgeStoppedError: the budget is spent, no server answers, or all calls are refused.
        """
        batch = self.open_batch()
        batch.submit(sample, captions)
        return batch.results()[0]

    def open_batch(self) -> EndpointBatch:
        """Begin the scoring of one step."""
        return EndpointBatch(self._loop, self._endpoint, len(self.tasks), self._score_group, self._breakdowns)

    def take_metrics(self) -> dict[str, float]:
        """Metrics since the last call of this method, and the run's cost and the servers' limits; writes the ledger."""
        usage = self._loop.run(self._take_usage())
        self.client.ledger.save()
        return {
            **usage.metrics(),
            "judge/cost_total": float(self.client.ledger.totals["cost"]),
            "judge/limit": float(sum(server.limit.limit for server in self.client.servers)),
            "judge/breaker_opened": float(sum(server.breaker.num_opened for server in self.client.servers)),
        }

    async def _take_usage(self) -> Usage:
        usage, self.client.usage = self.client.usage, Usage()
        return usage

    def close(self) -> None:
        """Close connections, cache and threads, and write the ledger. Closing twice is harmless."""
        self._loop.run(self.client.close())
        self._loop.close()
        self._images.shutdown(cancel_futures=True)
        if self.client.cache is not None:
            self.client.cache.close()

    # ------------------------------------------------------------------------------------------------ one group

    def run_calls(
        self, calls: Iterable[tuple[K, Callable[[], Call]]], keep: Callable[[K, Reply | Exception], None]
    ) -> None:
        """Make independent calls, as many at once as there are places; each call is built when its turn comes.

        Args:
            calls: pairs of a call's name and a function that builds the call (in a thread, one at a time); if the
                function raises, the exception is the call's result.
            keep: is given each call's name and its result as it comes: the reply, or the error if there is none.

        Raises:
            JudgeStoppedError: for the reasons of ``score``.
        """
        waiting = iter(calls)

        async def work() -> None:
            loop = asyncio.get_running_loop()
            for name, make in waiting:
                try:
                    call = await loop.run_in_executor(self._images, make)
                except Exception as error:  # such as an image that does not decode
                    keep(name, error)
                    continue
                try:
                    reply: Reply | Exception = await self.client.ask(call)
                except CallFailedError as error:
                    reply = error
                keep(name, reply)

        async def all_workers() -> None:
            await _all_ended([asyncio.ensure_future(work()) for _ in range(self.client.num_slots)])

        self._loop.run(all_workers())

    def encode(self, sample: Sample) -> EncodedImage:
        """Encode the sample's image as it is sent; raises the ``ImageError`` of an unusable image."""
        protocol = self._protocol
        return encode_image(
            sample.load_image(), max_pixels=protocol.image_max_pixels, image_format=protocol.image_format
        )

    async def _score_group(self, group: GroupState) -> None:
        """Ask for whatever a group still lacks, as its captions come, until it is closed and its calls have ended."""
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                group.changed.clear()
                waiting = [
                    c for c in group.distinct.values() if c.text not in tasks and len(c.replies) < len(self.tasks)
                ]
                await self._admit(group, waiting, tasks)
                if group.closed and not group.changed.is_set():
                    break
                await group.changed.wait()
            await _all_ended(list(tasks.values()))
        finally:
            for task in tasks.values():
                task.cancel()
            if group.units_task is not None:
                group.units_task.cancel()
                await asyncio.gather(group.units_task, return_exceptions=True)
                group.units_task = None
            group.image = None  # so that memory holds only images of groups in flight

    async def _admit(
        self, group: GroupState, captions: list[CaptionState], tasks: dict[str, asyncio.Task[None]]
    ) -> None:
        """Start scoring some captions, in the order in which they came, as places become free."""
        if not captions:
            return
        if self._admission is None or self._places is None:
            self._admission = asyncio.Lock()
            self._places = asyncio.Semaphore(2 * self.client.num_slots)
        needs_units = any(task in _NEED_UNITS for task in self._wanted(captions))
        if needs_units and not group.units and group.units_task is None:
            group.units_task = asyncio.ensure_future(self._units_of(group))
        async with self._admission:
            await self._encode_image(group, captions)
            for caption in captions:
                await self._places.acquire()
                tasks[caption.text] = asyncio.ensure_future(self._score_caption(group, caption))
                tasks[caption.text].add_done_callback(self._release_place)

    def _release_place(self, _: asyncio.Task[None]) -> None:
        if self._places is not None:
            self._places.release()

    def _wanted(self, captions: list[CaptionState]) -> set[str]:
        """The tasks for which at least one of the captions still has no reply."""
        return {t for t in self.tasks if any(t not in c.replies and not is_wordless(c.text) for c in captions)}

    async def _encode_image(self, group: GroupState, captions: list[CaptionState]) -> None:
        """Encode the image in a thread, once per group; if that fails, tasks that need the image become impossible."""
        if group.image is not None or not any(task in _NEED_IMAGE for task in self._wanted(captions)):
            return
        loop = asyncio.get_running_loop()
        try:
            group.image = await loop.run_in_executor(self._images, self.encode, group.sample)
        except Exception as error:  # Pillow and the file system raise nearly anything
            for caption in captions:
                caption.errors |= dict.fromkeys(_NEED_IMAGE, f"the image is unusable ({type(error).__name__})")
                caption.impossible |= set(_NEED_IMAGE) & set(self.tasks)

    async def _units_of(self, group: GroupState) -> tuple[str, ...]:
        """The units of the group's reference: prepared ones, or those in the judge's reply."""
        reference = group.sample.reference
        prepared = self._units.get(reference) if self._units is not None else None
        if prepared is not None:
            return prepared
        call = Call(TASKS["decompose"], {"reference": self._clipped(reference)})
        reply = await self.client.ask(call, item=group.item)
        assert isinstance(reply, DecomposeReply)
        return tuple(dict.fromkeys(reply.units))

    def _clipped(self, text: str) -> str:
        """What the judge sees of a text: its first part, in which lone surrogates (invalid text) are replaced."""
        return _SURROGATES.sub("\ufffd", text[: self._protocol.max_caption_chars])

    async def _score_caption(self, group: GroupState, caption: CaptionState) -> None:
        if is_wordless(caption.text):
            return
        missing = [task for task in self.tasks if task not in caption.replies and task not in caption.impossible]
        await _all_ended([asyncio.ensure_future(self._ask_task(group, caption, task)) for task in missing])

    async def _ask_task(self, group: GroupState, caption: CaptionState, task: str) -> None:
        try:
            if task in _NEED_UNITS and not group.units and group.units_task is not None:
                group.units = await asyncio.shield(group.units_task)
            call = self._call(group, caption, task)
            if call is not None:
                # The sample's id is the affinity: all calls about an image prefer the server whose cache holds it.
                caption.replies[task] = await self.client.ask(call, group.sample.sample_id, item=group.item)
                caption.errors.pop(task, None)
        except CallLeftOutError as error:
            caption.errors[task] = str(error)
            caption.impossible.add(task)
            self._refusal_log.note(group.sample.sample_id, error)
        except CallFailedError as error:
            caption.errors[task] = str(error)
        except FactsError as error:
            caption.errors[task] = str(error)
            caption.impossible.add(task)

    def _call(self, group: GroupState, caption: CaptionState, task: str) -> Call | None:
        """The call for a task, or None if something that the task needs is missing."""
        data: dict[str, object] = {"caption": self._clipped(caption.text)}
        if task in _NEED_UNITS:
            if not group.units:
                return None
            data = {"units": numbered(group.units), **data}
        elif task == "questions":
            data = {"questions": questions_data(group.sample)[0], **data}
        elif task == "rubric":
            data = {"criteria": criteria_data(group.sample)[0], **data}
        image = group.image if TASKS[task].needs_image else None
        if TASKS[task].needs_image and image is None:
            return None
        return Call(TASKS[task], data, image)

    def _breakdown(self, group: GroupState, caption: CaptionState) -> RewardBreakdown:
        if is_wordless(caption.text):
            return wordless_breakdown(group.units, tuple(self._extra.values()))
        extra = {}
        for task, name in self._extra.items():
            reply = caption.replies.get(task)
            if isinstance(reply, QuestionsReply):
                extra[name] = questions_score(reply, questions_data(group.sample)[1])
            elif isinstance(reply, RubricReply):
                extra[name] = rubric_score(reply, criteria_data(group.sample)[1])
        replies = {task: reply for task, reply in caption.replies.items() if task not in self._extra}
        return breakdown_of(self._clipped(caption.text), replies, group.units, extra, list(caption.errors.values()))

    def _breakdowns(self, group: GroupState) -> list[RewardBreakdown]:
        by_text = {text: self._breakdown(group, caption) for text, caption in group.distinct.items()}
        return [by_text[text] for text in group.captions]


async def _all_ended(tasks: Sequence[asyncio.Future[None]]) -> None:
    """Wait for all tasks, then raise the first error: calls in flight when a budget ends are paid for, so keep them."""
    for error in await asyncio.gather(*tasks, return_exceptions=True):
        if error is not None:
            raise error
