"""Prompts of the next step, decoded and preprocessed in a separate thread while the present step runs.

The thread does not affect the order of the data: runs with and without it draw the same prompts. A checkpoint holds the
position after the last step that was used, not after the last step that was drawn.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from balcaprl.config import SamplingConfig, TrainConfig
from balcaprl.data import Dataset, DatasetError, ImageError, SampleStream
from balcaprl.data.stream import decoded
from balcaprl.logtext import log_few, printable
from balcaprl.policy import Policy
from balcaprl.types import Prompt, PromptError, Sample

logger = logging.getLogger(__name__)

_MAX_UNUSABLE_IN_A_ROW = 1000


def room_for_prompt(model_config: Any, sampling: SamplingConfig) -> int | None:
    """Number of tokens that the model's position limit leaves for a prompt; None if the model names no limit."""
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit) - sampling.max_completion_tokens


@dataclass(frozen=True)
class PromptMaker:
    """The only way from a sample to a prompt, so training, evaluation and every command refuse the same samples."""

    prepare: Callable[[Sample], Prompt]
    """Function that makes a prompt of a sample, as ``policy.prepare`` does."""
    max_prompt_tokens: int | None = None
    """Most tokens that a prompt may have; longer prompts are refused. None sets no limit."""

    @classmethod
    def of(cls, policy: Policy, config: TrainConfig) -> PromptMaker:
        """Make a ``PromptMaker`` for ``policy`` under a configuration.

        Raises:
            ValueError: ``data.instruction`` holds a control token, so that every prompt would hold it.
        """
        token = policy.record_text.control_token(config.data.instruction)
        if token is not None:
            raise ValueError(
                f"data.instruction: it holds the control token {token!r}; the chat template adds what is needed"
            )
        return cls(policy.prepare, room_for_prompt(policy.model.config, config.rollout.sampling))

    def __call__(self, sample: Sample) -> Prompt:
        """Make the prompt of a sample.

        Raises:
            PromptError: the text or the image cannot be used, or the prompt leaves no room for a completion.
        """
        try:
            prompt = self.prepare(sample)
        except PromptError:
            raise
        except Exception as error:  # a processor is foreign code; one odd picture must not end a run
            raise PromptError(
                f"its image cannot be preprocessed: {type(error).__name__}: {printable(error)}"
            ) from error
        limit = self.max_prompt_tokens
        if limit is not None and len(prompt.prompt_ids) > limit:
            raise PromptError(
                f"its prompt has {len(prompt.prompt_ids)} tokens, and {limit} leave room for a completion"
            )
        return prompt


@dataclass(frozen=True)
class HeldOut:
    """The held-out samples as prompts."""

    prompts: list[Prompt]
    num_excluded: int = 0
    """Number of held-out samples that cannot be used; scores are means over the others."""


def held_out_prompts(dataset: Dataset, make: PromptMaker) -> HeldOut:
    """Make a prompt of every held-out sample that can be used, and log one message about the others.

    Raises:
        DatasetError: there are held-out samples, and none of them can be used.
    """
    prompts: list[Prompt] = []
    problems: list[str] = []
    for index in range(len(dataset.evaluation)):
        sample = dataset.evaluation[index]
        try:
            prompts.append(make(decoded(sample)))
        except (ImageError, PromptError) as error:
            problems.append(f"{printable(sample.sample_id)}: {printable(error)}")
    if problems:
        message = f"{len(problems)} of {len(dataset.evaluation)} held-out samples cannot be used: " + "; ".join(
            problems[:3]
        )
        if not prompts:
            raise DatasetError(f"{message}; mend the data, or set data.num_eval to 0")
        logger.warning("%s; scores are means over the others", message)
    return HeldOut(prompts, len(problems))


def _single_threaded_pool() -> ThreadPoolExecutor:
    """Pool of one thread whose torch operations run in that thread only.

    If the thread had an OpenMP team of its own, there would be more OpenMP threads than cores. libgomp would then let
    every team sleep after each operation, for the rest of the process: sampling with a small model took 2.3 times as
    long.
    """
    num_threads = torch.get_num_threads()

    def compute_alone() -> None:
        torch.set_num_threads(1)
        # This call fixes the number for this thread, which would otherwise take the default at its first use.
        torch.get_num_threads()

    pool = ThreadPoolExecutor(1, "prompts", initializer=compute_alone)
    pool.submit(int).result()
    torch.set_num_threads(num_threads)  # the call in the thread also changed the default for later threads
    return pool


class PromptStream:
    """Draws prompts from a stream of samples, by default those of the next step ahead of time.

    A sample that cannot be made into a prompt is skipped. Each such sample is counted once; the first few are logged.

    Args:
        samples: the stream of samples; nothing else may use it from now on.
        make: function that makes a prompt of a sample.
        ahead: whether to prepare the next step's prompts while the present step runs.
    """

    def __init__(self, samples: SampleStream, make: PromptMaker, *, ahead: bool = True) -> None:
        self._samples, self._make = samples, make
        self._pool = _single_threaded_pool() if ahead else None
        self._skipped: set[str] = set()
        self._next: tuple[int, Future[tuple[list[Prompt], dict[str, Any]]]] | None = None
        self._drawn: deque[dict[str, Any]] = deque()
        self._used = self._state()

    @property
    def num_undecodable(self) -> int:
        """Number of distinct samples whose image did not decode, up to the last step that was used."""
        return len(self._used["undecodable"])

    @property
    def num_skipped(self) -> int:
        """Number of distinct samples that decoded but gave no prompt, up to the last step that was used."""
        return len(self._used["skipped_prompts"])

    def next(self, count: int) -> list[Prompt]:
        """The prompts of the next step.

        Raises:
            DatasetError: there are no usable samples.
        """
        if self._next is not None and self._next[0] == count:
            prompts, state = self._next[1].result()
        else:
            # The prompts drawn ahead are for another count: go back to the position before them and draw again.
            if self._next is not None:
                self._next[1].result()
                self._load(self._drawn[-1] if self._drawn else self._used)
            prompts, state = self._draw(count)
        self._drawn.append(state)
        self._next = None if self._pool is None else (count, self._pool.submit(self._draw, count))
        return prompts

    def use(self) -> None:
        """Record that the earliest unused step is now the run's present one, so that a checkpoint resumes after it."""
        self._used = self._drawn.popleft()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step that was used, as plain JSON values."""
        return self._used

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, and forget what was drawn beyond it.

        Raises:
            DatasetError: the state belongs to other data.
        """
        if self._next is not None:
            self._next[1].exception()
            self._next = None
        self._drawn.clear()
        self._load(state)
        self._used = self._state()

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _load(self, state: dict[str, Any]) -> None:
        skipped = state.get("skipped_prompts", [])
        self._skipped = set(skipped) if isinstance(skipped, list) else set()  # older checkpoints hold only a count
        self._samples.load_state_dict(state)

    def _state(self) -> dict[str, Any]:
        return {**self._samples.state_dict(), "skipped_prompts": sorted(self._skipped)}

    def _draw(self, count: int) -> tuple[list[Prompt], dict[str, Any]]:
        prompts: list[Prompt] = []
        unusable_in_a_row = 0
        while len(prompts) < count:
            for sample in self._samples.next_decodable(count - len(prompts)):
                try:
                    prompts.append(self._make(sample))
                    unusable_in_a_row = 0
                except PromptError as error:
                    self._skip(sample, error)
                    unusable_in_a_row += 1
                    if unusable_in_a_row >= _MAX_UNUSABLE_IN_A_ROW:
                        raise DatasetError(
                            f"no usable prompt in {unusable_in_a_row} samples; the last: {printable(error)}"
                        ) from error
        return prompts, self._state()

    def _skip(self, sample: Sample, error: PromptError) -> None:
        if sample.sample_id in self._skipped:
            return
        self._skipped.add(sample.sample_id)
        log_few(logger, len(self._skipped), "skipped %s: %s", printable(sample.sample_id), printable(error))
