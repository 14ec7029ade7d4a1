"""Supplies the groups of each step.

A step is sampled when it is needed or, with ``rollout.max_staleness: 1``, while the step before is scored and learnt
from. The judge gets each completion as soon as the sampler finishes it. A judge that works in the background therefore
scores the first completions while the last are still being sampled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from balcaprl.config import RolloutConfig
from balcaprl.reporting.metrics import PhaseTimer
from balcaprl.rewards import GroupScorer
from balcaprl.rewards.scoring import GroupHandle
from balcaprl.rollout import Sampler
from balcaprl.rollout.prompts import PromptStream
from balcaprl.rollout.sampler import Draw, gather
from balcaprl.types import Prompt, RolloutGroup


@dataclass(frozen=True)
class SampledStep:
    """The groups of one step, in the order of its prompts, and the scorer that has received all of them."""

    groups: list[RolloutGroup]
    scorer: GroupScorer
    seconds: float
    """Time that the sampling took, in seconds."""


class RolloutPipeline:
    """Samples step after step.

    With staleness 0, a step is sampled when it is asked for. With staleness 1, a thread samples it from the weights of
    the latest sync while the step before is scored and learnt from. Any other user of the sampler must first call
    ``settle``.

    Args:
        config: the ``rollout`` section of the configuration.
        sampler: sampler that draws completions; with staleness 1, it must not share weights with the trainer.
        prompts: stream of the prompts of the coming steps.
        make_scorer: function that makes a new scorer for each step.
        step_seed: function that returns the seed of a step's sampling.
        timer: timer that records the phases ``data`` and ``sample``.
    """

    def __init__(
        self,
        config: RolloutConfig,
        sampler: Sampler,
        prompts: PromptStream,
        *,
        make_scorer: Callable[[], GroupScorer],
        step_seed: Callable[[int], int],
        timer: PhaseTimer,
    ) -> None:
        self._config, self._sampler, self._prompts = config, sampler, prompts
        self._make_scorer, self._step_seed, self._timer = make_scorer, step_seed, timer
        self._pool: ThreadPoolExecutor | None = None
        if config.max_staleness:  # a new thread does not inherit the run's number of torch threads
            self._pool = ThreadPoolExecutor(1, "rollout", torch.set_num_threads, (torch.get_num_threads(),))
        self._pending: tuple[int, Future[SampledStep]] | None = None

    def take(self, step: int) -> SampledStep:
        """Return the groups of a step, which becomes the run's present step."""
        if self._pending is not None and self._pending[0] == step:
            with self._timer("sample"):
                sampled = self._pending[1].result()
            self._pending = None
        else:
            with self._timer("data"):
                prompts = self._prompts.next(self._config.prompts_per_step)
            with self._timer("sample"):
                sampled = self._sample(step, prompts)
        self._prompts.use()
        return sampled

    def start(self, step: int) -> None:
        """With staleness 1, begin to sample a step from the weights that the sampler has now."""
        if self._pool is not None:
            with self._timer("data"):
                prompts = self._prompts.next(self._config.prompts_per_step)
            self._pending = (step, self._pool.submit(self._sample, step, prompts))

    def settle(self) -> None:
        """Wait until nothing is being sampled."""
        if self._pending is not None:
            with self._timer("sample"):
                self._pending[1].exception()

    def close(self) -> None:
        """Wait for the sampling that is under way, and end the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._prompts.close()

    def _sample(self, step: int, prompts: list[Prompt]) -> SampledStep:
        started = time.perf_counter()
        scorer = self._make_scorer()
        config, seed = self._config, self._step_seed(step)
        handles = [scorer.open_group(prompt.sample) for prompt in prompts]
        draws = self._sampler.stream(prompts, config.group_size, config.sampling, seed=seed)
        groups = gather(prompts, self._handed_over(draws, handles), self._sampler.policy_version)
        for group, handle in zip(groups, handles, strict=True):
            scorer.submit(group, handle)
        return SampledStep(groups, scorer, time.perf_counter() - started)

    @staticmethod
    def _handed_over(draws: Iterator[Draw], handles: list[GroupHandle]) -> Iterator[Draw]:
        for draw in draws:
            handles[draw.prompt].add(draw.position, draw.rollout)
            yield draw
