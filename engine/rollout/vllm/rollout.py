"""Samples with vLLM in this process, from the trainer's own weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal

from balcaprl.config import SamplingConfig
from balcaprl.extras import install_extra
from balcaprl.policy import Policy
from balcaprl.rollout.adapters import AdapterMerge, adapted_modules, has_split_head
from balcaprl.rollout.probe import NUM_PROBE_TOKENS, Probe
from balcaprl.rollout.sampler import Draw, PolicySampler, check_prompt, check_request, make_rollouts, prompt_seed
from balcaprl.rollout.vllm.kv_cache import kv_cache_budget
from balcaprl.rollout.weights import (
    InplaceCopy,
    Reload,
    SharedWeights,
    StaleWeightsError,
    SyncStrategy,
    why_not_inplace,
    why_not_shared,
)
from balcaprl.types import Prompt, SyncReport

logger = logging.getLogger(__name__)

_LENGTH_MULTIPLE = 128
"""``max_model_len`` is rounded up to a multiple of this, so that a slightly longer prompt needs no new engine."""


class VLLMRollout(PolicySampler):
    """The sampler that runs vLLM beside the trainer, on the policy's own weights.

    The engine is made at the first ``generate``, because lengths and image sizes are not known earlier. It is replaced
    if a request exceeds its limits or if it fails. An engine always starts from the policy's present weights. vLLM
    allows only one engine at a time in a process: close one before another generates.

    With the strategy ``shared`` the policy's parameters move into vLLM's tensors. They stay ordinary parameters: they
    can be trained in place, saved, and used after ``close``.
    """

    name = "vllm"

    def __init__(
        self,
        policy: Policy,
        *,
        max_completion_tokens: int = 128,
        max_prompt_tokens: int = 0,
        memory_gib: float | None = None,
        gpu_memory_utilization: float = 0.4,
        max_num_seqs: int = 256,
        sync: Literal["auto", "shared", "inplace", "reload"] = "auto",
        probe: Literal["first", "always"] = "first",
        independent: bool = False,
        sleep: bool = False,
    ) -> None:
        """Keep the settings; no engine is loaded yet.

        Args:
            policy: The policy to sample from.
            max_completion_tokens: Longest completion that will be asked for, in tokens.
            max_prompt_tokens: Longest prompt that will be used, in tokens with images expanded, if known in advance.
            memory_gib: Size of the KV cache in GiB; None for as much as the requests need.
            gpu_memory_utilization: Share of a GPU's memory that vLLM may take.
            max_num_seqs: Largest number of completions that are decoded at once.
            sync: Strategy by which new weights reach the engine; see ``weights.py``. ``auto`` takes the first that
                works.
            probe: When a sync asks the engine for a few tokens and compares their log-probabilities with the policy's:
                only at the first sync of every engine, or always. ``reload`` always does so.
            independent: Whether the policy changes while the engine samples, so that the two must not share weights.
            sleep: Free the KV cache while the trainer updates; needs CUDA.

        Raises:
            RuntimeError: vLLM is not installed.
            ValueError: ``sync`` is ``shared`` although the policy is ``independent``.
        """
        if find_spec("vllm") is None:
            raise RuntimeError(
                "rollout.sampler = vllm needs vLLM, which is not installed. Set rollout.sampler to hf, or run "
                + install_extra("gpu" if policy.device.type == "cuda" else "cpu")
            )
        if independent and sync == "shared":
            raise ValueError("sync: shared would change the weights while the engine samples; use inplace or auto")
        super().__init__(policy)
        self._max_completion_tokens = max_completion_tokens
        self._max_prompt_tokens = max_prompt_tokens
        self._memory_gib = memory_gib
        self._gpu_memory_utilization = gpu_memory_utilization
        self._max_num_seqs = max_num_seqs
        self._wanted, self._probe_when, self._independent = sync, probe, independent
        self._can_sleep = sleep and policy.device.type == "cuda"
        self._image_size: tuple[int, int] | None = None
        self._num_completions = 1
        self._engine: Any = None
        self._strategy: SyncStrategy | None = None
        self._probe = Probe(policy, self._ask, same_precision=True)
        self._asleep = False
        self._closed = False
        self._served_writes = 0
        self.num_restarts = 0
        """Number of engines that failed and were replaced."""

    def stream(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingConfig, *, seed: int, greedy: bool = False
    ) -> Iterator[Draw]:
        """Sample completions, one engine request per completion. See ``Sampler.stream``.

        An engine that fails is replaced once, and its missing completions are sampled again, from the same seeds.

        Raises:
            ValueError: A prompt with its completion exceeds what the model or the memory can hold, or a prompt does not
                fit its image.
            RuntimeError: The engine fails twice, or the sampler is closed.
            StaleWeightsError: The policy was trained since the last ``sync`` and is not ``independent``.
        """
        check_request(prompts, group_size)
        self._check_placeholders(prompts)
        self._refuse_if_stale()
        # vLLM samples at most one greedy completion; a greedy group repeats that one.
        owed = {(index, position) for index in range(len(prompts)) for position in range(1 if greedy else group_size)}
        for attempt in (1, 2):
            self._ensure_engine(prompts, group_size, sampling.max_completion_tokens)
            try:
                for draw in self._sample(prompts, sorted(owed), sampling, None if greedy else seed):
                    owed.discard((draw.prompt, draw.position))
                    yield draw
                    if greedy:
                        yield from (replace(draw, position=p, rollout=copy(draw.rollout)) for p in range(1, group_size))
                return
            except GeneratorExit:
                self._engine.abort_all()
                raise
            except Exception as error:
                self._discard_engine()
                if attempt == 2:
                    raise RuntimeError(f"vLLM failed twice in a row while sampling: {error}") from error
                self.num_restarts += 1
                logger.warning("vLLM failed while sampling and is started anew: %s: %s", type(error).__name__, error)
            except BaseException:  # Ctrl-C may interrupt a step, which leaves the engine in an unknown state
                self._discard_engine()
                raise

    def sync(self, policy_version: int) -> SyncReport:
        """Bring the engine to the policy's weights, drop its caches and verify the result. See ``Sampler.sync``.

        Raises:
            StaleWeightsError: The engine does not serve the policy's weights afterwards.
        """
        self._refuse_if_closed()
        started = time.perf_counter()
        if self._engine is None or self._strategy is None:
            self.policy_version = policy_version
            return SyncReport("unloaded", 0, 0, 0.0, policy_version)
        self.wake_up()
        num_tensors, num_bytes = self._strategy.push(policy_version)
        self.policy_version = policy_version
        self._engine.drop_caches()
        if self._probe_when == "always" or self._strategy.name == "reload" or not self._probe.passed:
            self._probe.verify(policy_version)
        self._served_writes = num_writes(self._policy)
        return SyncReport(self._strategy.name, num_tensors, num_bytes, time.perf_counter() - started, policy_version)

    def sleep(self) -> bool:
        """Free the KV cache's memory until the next ``generate``; returns whether the engine sleeps."""
        if self._engine is None or self._asleep:
            return self._asleep
        self._asleep = self._engine.sleep()
        return self._asleep

    def wake_up(self) -> None:
        """Undo ``sleep``; ``generate`` and ``sync`` call this by themselves."""
        if self._asleep:
            self._engine.wake_up()
            self._asleep = False

    def close(self) -> None:
        """Shut the engine down and free its memory; the policy stays usable. See ``Sampler.close``."""
        self._closed = True
        self._discard_engine()

    # --------------------------------------------------------------------------------------------------- sampling

    def _sample(
        self, prompts: Sequence[Prompt], owed: Sequence[tuple[int, int]], sampling: SamplingConfig, seed: int | None
    ) -> Iterator[Draw]:
        """Sample the completions in ``owed``, given as (prompt index, place in its group), each as one request."""
        requests = {index: self._engine.request(prompts[index]) for index in {index for index, _ in owed}}
        for index, position in owed:
            each = None if seed is None else prompt_seed(seed, index) + position
            self._engine.submit(f"{index}-{position}", requests[index], self._engine.params(sampling, each))
        for done in self._engine.finished():
            index, position = map(int, done.request_id.split("-"))
            check_prompt(self._policy, prompts[index], done.prompt_ids)
            (rollout,) = make_rollouts(self._policy, [done.token_ids], [done.logprobs], sampling.stop)
            yield Draw(index, position, rollout)

    def _check_placeholders(self, prompts: Sequence[Prompt]) -> None:
        config, family = self._policy.model.config, self._policy.family
        for prompt in prompts:
            expected = family.num_image_tokens(self._policy.stock_model, prompt.image_inputs)
            found = int((prompt.prompt_ids == family.image_token_id(config)).sum())
            if expected is not None and found != expected:
                raise ValueError(
                    f"prompts: sample {prompt.sample.sample_id} has {found} image placeholders, its image makes "
                    f"{expected} features; take prompt_ids and image_inputs from one policy.prepare"
                )

    def _ask(self, prompt: Prompt) -> tuple[list[int], list[float]]:
        """Sample the few greedy tokens that the probe needs; returns ids and log-probabilities."""
        params = self._engine.params(SamplingConfig(max_completion_tokens=NUM_PROBE_TOKENS), None)
        self._engine.submit("probe", self._engine.request(prompt), params)
        (done,) = list(self._engine.finished())
        return done.token_ids, done.logprobs

    # --------------------------------------------------------------------------------------------------- the engine

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError("this VLLMRollout is closed; make a new one")

    def _refuse_if_stale(self) -> None:
        """Raise StaleWeightsError after a forgotten sync: even if weights are shared, caches still hold old results."""
        if self._engine is None or self._independent or num_writes(self._policy) == self._served_writes:
            return
        raise StaleWeightsError(
            f"the policy's weights changed since the sampler was synced to version {self.policy_version}: call "
            "sync(policy_version) after an update, before the next generate"
        )

    def _ensure_engine(self, prompts: Sequence[Prompt], group_size: int, max_completion_tokens: int) -> None:
        """Make sure that there is an engine for these prompts with their completions; replace one that is too small."""
        self._refuse_if_closed()
        self._probe.choose(prompts)
        self._max_completion_tokens = max(self._max_completion_tokens, max_completion_tokens)
        self._max_prompt_tokens = max(self._max_prompt_tokens, *(len(prompt.prompt_ids) for prompt in prompts))
        self._num_completions = max(self._num_completions, min(self._max_num_seqs, len(prompts) * group_size))
        needed = self._max_prompt_tokens + self._max_completion_tokens
        if self._engine is not None and needed <= self._engine.limits.max_model_len:
            self.wake_up()
            return
        limit = getattr(self._policy.model.config.get_text_config(), "max_position_embeddings", needed)
        if needed > limit:
            raise ValueError(
                f"a prompt of {self._max_prompt_tokens} tokens and a completion of {self._max_completion_tokens} "
                f"exceed the model's {limit} positions: lower data.max_pixels or rollout.sampling.max_completion_tokens"
            )
        sizes = [prompt.image.size for prompt in prompts if prompt.image_inputs]
        if sizes or self._image_size:
            sizes.append(self._image_size or (1, 1))
            self._image_size = (max(width for width, _ in sizes), max(height for _, height in sizes))
        self._discard_engine()
        self._start(min(limit, -(-needed // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE))

    def _start(self, max_model_len: int) -> None:
        from balcaprl.rollout.vllm.engine import EngineLimits, VLLMEngine

        limits = EngineLimits(
            max_model_len=max_model_len,
            max_num_seqs=self._max_num_seqs,
            image_size=self._image_size,
            kv_cache_bytes=kv_cache_budget(
                self._policy,
                max_model_len=max_model_len,
                num_completions=self._num_completions,
                memory_gib=self._memory_gib,
                gpu_memory_utilization=self._gpu_memory_utilization,
            ),
            gpu_memory_utilization=self._gpu_memory_utilization,
            can_sleep=self._can_sleep,
        )
        self._engine = VLLMEngine(self._policy, limits, plain_weights=self._wanted != "reload")
        try:
            self._strategy, reason = self._choose_strategy()
            self._probe.calibrate()
        except BaseException:
            self._discard_engine()
            raise
        self._served_writes = num_writes(self._policy)
        logger.info("weights reach vLLM by %s: %s", self._strategy.name, reason)

    def _choose_strategy(self) -> tuple[SyncStrategy, str]:
        """Return the strategy that is asked for, or for ``auto`` the first that works, and the reason for it."""
        engine, wanted = self._engine, self._wanted
        if wanted == "reload":
            return Reload(engine.reload), "as configured"
        adapts = any(adapted_modules(self._policy.stock_model))
        plan = engine.plan()
        obstacle = why_not_inplace(plan)
        if has_split_head(self._policy.stock_model):
            obstacle = "an adapter parts the head from the embedding that it is tied to"
        if obstacle is None and not engine.computes_from_plain_weights():
            obstacle = "vLLM computes from repacked weights"
        if obstacle is not None:
            if wanted != "auto":
                raise ValueError(f"sync: {wanted} cannot be done here, {obstacle}; use auto or reload")
            if adapts:
                engine.reload()  # the first load was without adapters, to record where the weights go
            return Reload(engine.reload), obstacle
        plan.check_values()
        if adapts:
            if wanted != "auto":
                raise ValueError(f"sync: {wanted} cannot be done with adapters; use auto or reload")
            strategy = AdapterMerge(plan, self._policy.stock_model, share_trained=not self._independent)
            return strategy, "the policy trains adapters: its frozen weights are shared, adapted ones merged"
        obstacle = "the policy changes while vLLM samples" if self._independent else why_not_shared(plan)
        unused = f"; vLLM does without {len(plan.unserved)} of the policy's tensors" if plan.unserved else ""
        if wanted == "inplace" or (wanted == "auto" and obstacle is not None):
            return InplaceCopy(plan), (obstacle or "as configured") + unused
        if obstacle is not None:
            raise ValueError(f"sync: shared cannot be done here, {obstacle}; use auto or inplace")
        return SharedWeights(plan), f"all {plan.num_tensors} tensors of the policy are views of vLLM's{unused}"

    def _discard_engine(self) -> None:
        """Shut the engine down; the policy's parameters stay valid even if they lie in the engine's memory."""
        engine, strategy = self._engine, self._strategy
        self._engine, self._strategy, self._asleep = None, None, False
        if strategy is not None:
            strategy.detach(copy=engine.owns_weight_memory)
        if engine is not None:
            engine.shutdown()


def num_writes(policy: Policy) -> int:
    """Count the writes into the policy's parameters with autograd's counters, which miss writes through ``.data``."""
    return sum(parameter._version for parameter in policy.model.parameters())
