"""Prompts of the next steps, decoded and preprocessed in a thread of their own while the present step runs.

The order is the data's, whatever the thread does: two runs draw the same prompts, with and without it. What a checkpoint
holds is the place after the last step that was used, not after the last that was drawn.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from balcaprl.config import SamplingConfig
from balcaprl.data import DatasetError, SampleStream
from balcaprl.types import Prompt, Sample

logger = logging.getLogger(__name__)

_MAX_UNUSABLE_IN_A_ROW = 1000


def room_for_prompt(model_config: Any, sampling: SamplingConfig) -> int | None:
    """Tokens that the model's positions leave for a prompt; None where it names no limit."""
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit) - sampling.max_completion_tokens


def _single_threaded_pool() -> ThreadPoolExecutor:
    """One thread that computes alone.

    With a team of its own there are more OpenMP threads than cores, and libgomp then lets every team sleep after each
    operation, for the rest of the process: sampling with a small model took 2.3 times as long.
    """
    num_threads = torch.get_num_threads()

    def compute_alone() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # settles the number for this thread, which would else take the default at its first use

    pool = ThreadPoolExecutor(1, "prompts", initializer=compute_alone)
    pool.submit(int).result()
    torch.set_num_threads(num_threads)  # the call in the thread also set the default of threads that come later
    return pool


class PromptStream:
    """Draws prompts from a stream of samples, the next ones ahead of time.

    A sample whose image cannot be preprocessed, or whose prompt leaves no room for a completion, is skipped and counted.

    Args:
        samples: where samples come from; used by nothing else from now on.
        prepare: makes a prompt of a sample, as ``policy.prepare`` does.
        max_prompt_tokens: longer prompts are skipped; None: none is.
        ahead: prepare the next step's prompts while this one runs.
    """

    def __init__(
        self,
        samples: SampleStream,
        prepare: Callable[[Sample], Prompt],
        *,
        max_prompt_tokens: int | None = None,
        ahead: bool = True,
    ) -> None:
        self._samples, self._prepare, self._max_prompt_tokens = samples, prepare, max_prompt_tokens
        self._pool = _single_threaded_pool() if ahead else None
        self._skipped = 0
        self._next: tuple[int, Future[tuple[list[Prompt], dict[str, Any]]]] | None = None
        self._drawn: deque[dict[str, Any]] = deque()
        self._used = self._state()

    @property
    def num_undecodable(self) -> int:
        """Distinct samples, up to the last step that was used, whose image did not decode."""
        return len(self._used["undecodable"])

    @property
    def num_skipped(self) -> int:
        """Samples, up to the last step that was used, that could be decoded but not be made a prompt of."""
        return int(self._used["skipped_prompts"])

    def next(self, count: int) -> list[Prompt]:
        """The prompts of the next step.

        Raises:
            DatasetError: there are no usable samples.
        """
        if self._next is not None and self._next[0] == count:
            prompts, state = self._next[1].result()
        else:
            if self._next is not None:  # another number was expected: start again from where these were drawn
                self._next[1].result()
                self._load(self._drawn[-1] if self._drawn else self._used)
            prompts, state = self._draw(count)
        self._drawn.append(state)
        self._next = None if self._pool is None else (count, self._pool.submit(self._draw, count))
        return prompts

    def use(self) -> None:
        """Note that the earliest step that was drawn is the run's present one: a checkpoint goes on after it."""
        self._used = self._drawn.popleft()

    def state_dict(self) -> dict[str, Any]:
        """The place after the last step that was used, as plain JSON values."""
        return self._used

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; what was drawn beyond it is forgotten.

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
        self._skipped = int(state.get("skipped_prompts", 0))
        self._samples.load_state_dict(state)

    def _state(self) -> dict[str, Any]:
        return {**self._samples.state_dict(), "skipped_prompts": self._skipped}

    def _draw(self, count: int) -> tuple[list[Prompt], dict[str, Any]]:
        prompts: list[Prompt] = []
        unusable_in_a_row = 0
        while len(prompts) < count:
            for sample in self._samples.next_decodable(count - len(prompts)):
                problem = self._try(sample, prompts)
                unusable_in_a_row = 0 if problem is None else unusable_in_a_row + 1
                if problem is not None:
                    self._skipped += 1
                    logger.warning("skipped %s: %s", sample.sample_id, problem)
                if unusable_in_a_row >= _MAX_UNUSABLE_IN_A_ROW:
                    raise DatasetError(f"no usable prompt in {unusable_in_a_row} samples; the last: {problem}")
        return prompts, self._state()

    def _try(self, sample: Sample, prompts: list[Prompt]) -> str | None:
        """Append the sample's prompt; what is wrong with it otherwise."""
        try:
            prompt = self._prepare(sample)
        except Exception as error:  # a processor is foreign code, and one odd picture must not end a run
            return f"its image cannot be preprocessed: {type(error).__name__}: {error}"
        limit = self._max_prompt_tokens
        if limit is not None and len(prompt.prompt_ids) > limit:
            return f"its prompt has {len(prompt.prompt_ids)} tokens, and {limit} leave room for a completion"
        prompts.append(prompt)
        return None
