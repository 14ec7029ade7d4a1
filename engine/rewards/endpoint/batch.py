"""The groups that the endpoint judge scores at the same time, such as those of a step, and how long it waits for them.

A group's captions may come one by one while the rollouts are still being sampled. What is known of a group is kept in
its ``GroupState``: the judge adds replies to it, and its batch waits for them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from balcaprl.config import EndpointConfig
from balcaprl.rewards.background import BackgroundLoop
from balcaprl.rewards.endpoint.encoding import EncodedImage
from balcaprl.rewards.endpoint.protocol import Reply
from balcaprl.rewards.endpoint.scores import is_wordless
from balcaprl.types import JudgeStoppedError, RewardBreakdown, Sample


@dataclass
class CaptionState:
    """What is known of one distinct caption of a group."""

    text: str
    replies: dict[str, Reply] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    impossible: set[str] = field(default_factory=set)
    """Tasks that are not waited for: the data set lacks what they need, or the servers refuse them or fail on them."""


@dataclass
class GroupState:
    """One group: the captions of one image, and the state of their calls."""

    sample: Sample
    future: concurrent.futures.Future[list[RewardBreakdown]]
    captions: list[str] = field(default_factory=list)
    distinct: dict[str, CaptionState] = field(default_factory=dict)
    closed: bool = False
    """Whether all captions have been added."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when captions are added or the group is closed."""
    units: tuple[str, ...] = ()
    units_task: asyncio.Task[tuple[str, ...]] | None = None
    image: EncodedImage | None = None
    task: asyncio.Task[None] | None = None
    item: object = field(default_factory=object)
    """Identifies the group in all of its calls."""


class EndpointGroup:
    """One group of a batch; implements ``JudgeGroup``."""

    def __init__(self, loop: BackgroundLoop, group: GroupState) -> None:
        self._loop, self._group = loop, group
        self.future = group.future
        """Future that has the breakdowns as soon as the group is closed and all calls about it have ended."""

    def add(self, *captions: str) -> None:
        """Hand over the next captions and return at once."""
        self._loop.start(self._change(captions, closed=False))

    def close(self) -> None:
        """Declare that no more captions will come; returns at once."""
        self._loop.start(self._change((), closed=True))

    async def _change(self, captions: Sequence[str], closed: bool) -> None:
        # Runs only in the judge's event loop, where nothing else runs at the same time.
        self._group.captions += captions
        for text in captions:
            self._group.distinct.setdefault(text, CaptionState(text))
        self._group.closed = closed
        self._group.changed.set()


class EndpointBatch:
    """The groups of one step; implements ``JudgeBatch``.

    Args:
        loop: the judge's event loop, in which all work on the groups is done.
        endpoint: how long to wait, and for which share of the scores.
        num_tasks: number of tasks that are asked about every caption.
        score_group: asks for whatever a group still lacks; ends when the group is closed and all its calls have ended.
        breakdowns: makes the breakdowns of a group, in the order of its captions.
    """

    def __init__(
        self,
        loop: BackgroundLoop,
        endpoint: EndpointConfig,
        num_tasks: int,
        score_group: Callable[[GroupState], Coroutine[Any, Any, None]],
        breakdowns: Callable[[GroupState], list[RewardBreakdown]],
    ) -> None:
        self._loop, self._endpoint, self._num_tasks = loop, endpoint, num_tasks
        self._score_group, self._breakdowns = score_group, breakdowns
        self._groups: list[GroupState] = []

    def open_group(self, sample: Sample) -> EndpointGroup:
        """Open a group whose captions come one by one; until the first caption comes, its image costs nothing."""
        group = GroupState(sample, concurrent.futures.Future())
        self._groups.append(group)
        self._loop.start(self._start(group))
        return EndpointGroup(self._loop, group)

    def submit(self, sample: Sample, captions: Sequence[str]) -> concurrent.futures.Future[list[RewardBreakdown]]:
        """Hand over one group and return at once; the future has its breakdowns once all calls about it have ended."""
        group = self.open_group(sample)
        group.add(*captions)
        group.close()
        return group.future

    def results(self) -> list[list[RewardBreakdown]]:
        """Wait for all groups and return their breakdowns.

        Once ``endpoint.required_share`` of the scores has arrived, stragglers get ``endpoint.grace_s`` at most.

        Raises:
            JudgeStoppedError: the budget is spent; no server answers; or fewer scores than required arrived and no more
                came for ``endpoint.patience_s``, although they were asked for again and again.
        """
        try:
            self._loop.run(self._collect())
        finally:
            self._loop.run(self._cancel())
        return [self._breakdowns(group) for group in self._groups]

    async def _start(self, group: GroupState) -> None:
        group.task = asyncio.ensure_future(self._score_group(group))
        group.task.add_done_callback(lambda task: self._tell(group, task))

    def _tell(self, group: GroupState, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if group.future.done():
            return
        if task.cancelled():
            group.future.cancel()
        elif error is not None:
            group.future.set_exception(error)
        else:
            group.future.set_result(self._breakdowns(group))

    async def _collect(self) -> None:
        endpoint = self._endpoint
        clock: Callable[[], float] = asyncio.get_running_loop().time
        arrived, progress_at, wait_s = self._num_arrived(), clock(), endpoint.retry_wait_s
        while True:
            await self._wait_for_all()
            if self._share() >= endpoint.required_share:
                return
            if self._num_arrived() > arrived:
                arrived, progress_at, wait_s = self._num_arrived(), clock(), endpoint.retry_wait_s
            if clock() - progress_at > endpoint.patience_s:
                reasons = sorted({e for g in self._groups for c in g.distinct.values() for e in c.errors.values()})
                raise JudgeStoppedError(
                    f"only {self._share():.0%} of a step's scores arrived (endpoint.required_share is "
                    f"{endpoint.required_share:.0%}), and no more for {endpoint.patience_s:g} s (endpoint.patience_s): "
                    + "; ".join(reasons[:3])
                )
            await asyncio.sleep(wait_s)
            wait_s = min(endpoint.max_retry_wait_s, 2 * wait_s + 0.01)
            for group in self._groups:
                await self._start(group)

    async def _wait_for_all(self) -> None:
        """Wait until all groups have ended, or the required share is there and ``endpoint.grace_s`` is over."""
        endpoint = self._endpoint
        pending = {group.task for group in self._groups if group.task is not None}
        ended: set[asyncio.Task[None]] = set()
        while pending:
            enough = self._share() >= endpoint.required_share and endpoint.required_share < 1
            timeout = endpoint.grace_s if enough else 0.2
            done, pending = await asyncio.wait(pending, timeout=timeout)
            ended |= done
            if enough:
                break
        for task in ended:
            task.result()

    async def _cancel(self) -> None:
        tasks = [group.task for group in self._groups if group.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _num_arrived(self) -> int:
        return sum(len(caption.replies) for group in self._groups for caption in group.distinct.values())

    def _share(self) -> float:
        captions = [c for group in self._groups for c in group.distinct.values() if not is_wordless(c.text)]
        wanted = len(captions) * self._num_tasks - sum(len(caption.impossible) for caption in captions)
        return sum(len(caption.replies) for caption in captions) / wanted if wanted else 1.0
