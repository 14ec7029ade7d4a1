"""Sampling with vLLM in this process. The only module that imports vllm, and only when an engine is made."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from balcaprl.config import SamplingConfig
from balcaprl.policy import Policy
from balcaprl.rollout.sampler import check_request, make_group
from balcaprl.torchvision_compat import ensure_importable
from balcaprl.types import Prompt, RolloutGroup, SyncReport

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine has to see the trainer's tensors
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer computes in the same threads
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the ban is a logits processor of the first model runner
}
_ENVIRONMENT_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_LENGTH_MULTIPLE = 128
"""``max_model_len`` is rounded up to this, so that a slightly longer prompt needs no new engine."""


class VLLMRollout:
    """The ``Sampler`` that runs vLLM beside the trainer, loaded from the policy's own weights.

    The engine is made at the first ``generate``, as only then the lengths and image sizes are known, and made anew
    should a request outgrow it. It always starts from the policy's present weights. vLLM allows one engine at a time in
    a process: close one before another generates.
    """

    name = "vllm"

    def __init__(
        self,
        policy: Policy,
        *,
        max_completion_tokens: int = 128,
        max_prompt_tokens: int = 0,
        memory_gib: float = 1.0,
        gpu_memory_utilization: float = 0.4,
        max_num_seqs: int = 256,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            policy: What to sample from.
            max_completion_tokens: Longest completion that will be asked for.
            max_prompt_tokens: Longest prompt that will come, images expanded, where it is known beforehand.
            memory_gib: Key-value cache on a CPU.
            gpu_memory_utilization: Share of a GPU's memory that vLLM may take.
            max_num_seqs: Completions that are decoded at once.

        Raises:
            RuntimeError: If vLLM is not installed.
        """
        if find_spec("vllm") is None:
            raise RuntimeError(
                "rollout.sampler = vllm needs vLLM, which is not installed: install balcaprl[cpu] or balcaprl[gpu], "
                "or set rollout.sampler to hf"
            )
        self._policy = policy
        self._max_completion_tokens = max_completion_tokens
        self._max_prompt_tokens = max_prompt_tokens
        self._memory_gib = memory_gib
        self._gpu_memory_utilization = gpu_memory_utilization
        self._max_num_seqs = max_num_seqs
        self._image_size = (1, 1)
        self._llm: Any = None
        self._max_model_len = 0
        self._closed = False

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: SamplingConfig,
        *,
        seed: int,
        greedy: bool = False,
    ) -> list[RolloutGroup]:
        """See ``Sampler.generate``.

        Raises:
            RuntimeError: If vLLM expands a prompt otherwise than the policy's processor did, or after ``close``.
        """
        check_request(prompts, group_size)
        self._ensure_engine(prompts, sampling.max_completion_tokens)
        requests = [self._request(prompt) for prompt in prompts]
        # vLLM samples one greedy completion at most; the group is that one, repeated.
        copies = group_size if greedy else 1
        seeds = [_prompt_seed(seed, index) for index in range(len(prompts))]
        params = [self._sampling_params(group_size // copies, sampling, each, greedy) for each in seeds]
        with _untouched_random_state(self._policy.device):
            outputs = self._llm.generate(requests, params, use_tqdm=False)
        groups = []
        for prompt, output in zip(prompts, outputs, strict=True):
            _check_expansion(prompt, output.prompt_token_ids)
            ordered = sorted(output.outputs, key=lambda completion: completion.index) * copies
            ids = [list(completion.token_ids) for completion in ordered]
            logprobs = [_sampled_logprobs(completion) for completion in ordered]
            groups.append(make_group(self._policy, prompt, ids, logprobs))
        return groups

    def sync(self, policy_version: int) -> SyncReport:
        """See ``Sampler.sync``: vLLM reloads every tensor, then forgets all it computed with the old ones."""
        self._refuse_if_closed()
        started = time.perf_counter()
        if self._llm is None:
            return SyncReport("unloaded", 0, 0, 0.0, policy_version)
        tensors = self._named_tensors()
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})
        self._drop_caches()
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return SyncReport("reload", len(tensors), num_bytes, time.perf_counter() - started, policy_version)

    def close(self) -> None:
        """See ``Sampler.close``: shuts the engine down and gives its memory back."""
        self._closed = True
        self._shut_down()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError("this VLLMRollout is closed; make a new one")

    def _ensure_engine(self, prompts: Sequence[Prompt], max_completion_tokens: int) -> None:
        """Make the engine, or a larger one, so that every prompt with its completion fits."""
        self._refuse_if_closed()
        self._max_completion_tokens = max(self._max_completion_tokens, max_completion_tokens)
        self._max_prompt_tokens = max(self._max_prompt_tokens, *(len(prompt.prompt_ids) for prompt in prompts))
        needed = self._max_prompt_tokens + self._max_completion_tokens
        if self._llm is not None and needed <= self._max_model_len:
            return
        limit = getattr(self._policy.model.config.get_text_config(), "max_position_embeddings", needed)
        if needed > limit:
            raise ValueError(
                f"a prompt of {self._max_prompt_tokens} tokens and a completion of {self._max_completion_tokens} "
                f"exceed the model's {limit} positions: lower data.max_pixels or rollout.sampling.max_completion_tokens"
            )
        self._max_model_len = min(limit, -(-needed // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)
        sizes = [self._image_size, *(prompt.image.size for prompt in prompts)]
        self._image_size = (max(width for width, _ in sizes), max(height for _, height in sizes))
        self._shut_down()
        with tempfile.TemporaryDirectory(prefix="balcaprl-vllm-") as folder:
            self._save_without_weights(folder)
            self._llm = self._load(folder)

    def _save_without_weights(self, folder: str) -> None:
        """All that vLLM reads from a checkpoint folder but the weights, which it gets from memory."""
        config = copy.deepcopy(self._policy.model.config)
        config.architectures = [self._architecture]
        config.save_pretrained(folder)
        self._policy.processor.save_pretrained(folder)

    @property
    def _architecture(self) -> str:
        return type(self._policy.model).__name__

    def _load(self, folder: str) -> Any:
        os.environ.update(_ENVIRONMENT)
        for name, value in _ENVIRONMENT_DEFAULTS.items():
            os.environ.setdefault(name, value)
        ensure_importable()
        with _own_threads(), _untouched_random_state(self._policy.device), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            from vllm import LLM

            _inspect_in_process(self._architecture)
            width, height = self._image_size
            dtype: Any = str(self._policy.dtype).removeprefix("torch.")
            memory: dict[str, Any] = {"gpu_memory_utilization": self._gpu_memory_utilization}
            if self._policy.device.type == "cpu":
                memory = {"kv_cache_memory_bytes": int(self._memory_gib * 2**30)}
            return LLM(
                folder,
                load_format=_register_memory_loader(self._named_tensors()),
                dtype=dtype,
                enforce_eager=self._policy.device.type == "cpu",
                max_model_len=self._max_model_len,
                max_num_seqs=self._max_num_seqs,
                max_num_batched_tokens=max(4096, self._max_model_len),
                limit_mm_per_prompt={"image": {"count": 1, "width": width, "height": height}},
                logits_processors=[_ban(self._policy.image_token_ids)],
                logprobs_mode="processed_logprobs",
                # Sampling defaults of a published checkpoint, such as a repetition penalty, are not the policy's.
                generation_config="vllm",
                use_tqdm_on_load=False,
                disable_log_stats=True,
                **memory,
            )

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        """Token ids with one placeholder per image, which vLLM expands itself."""
        image_token_id = self._policy.family.image_token_id(self._policy.model.config)
        request: dict[str, Any] = {"prompt_token_ids": _collapse_runs(prompt.prompt_ids, image_token_id)}
        if prompt.image_inputs:
            request["multi_modal_data"] = {"image": prompt.image}
        return request

    def _sampling_params(self, num_completions: int, sampling: SamplingConfig, seed: int, greedy: bool) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=num_completions,
            temperature=0.0 if greedy else sampling.temperature,
            max_tokens=sampling.max_completion_tokens,
            stop_token_ids=list(self._policy.eos_token_ids),
            seed=None if greedy else seed,
            logprobs=0,
            detokenize=False,
        )

    def _named_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the policy by the name under which vLLM loads it."""
        rename = self._policy.family.published_name
        return {rename(name): tensor.detach() for name, tensor in self._policy.model.state_dict().items()}

    def _drop_caches(self) -> None:
        """Prefixes, preprocessed images and image features: all may stem from the old weights."""
        self._llm.reset_prefix_cache()
        self._llm.llm_engine.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def _shut_down(self) -> None:
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        cleanup_dist_env_and_memory()
        gc.collect()


def _ban(token_ids: Sequence[int]) -> type:
    """A vLLM logits processor that makes ``token_ids`` impossible in every request.

    A logit bias would not do: vLLM clamps it to 100, which a large logit outweighs.
    """
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class BannedTokens(LogitsProcessor):
        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            self._token_ids = torch.tensor(list(token_ids), dtype=torch.long, device=device)

        def apply(self, logits: Tensor) -> Tensor:
            return logits.index_fill_(-1, self._token_ids, -torch.inf)

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            """The ban is the same for all requests."""

    return BannedTokens


def _register_memory_loader(tensors: dict[str, Tensor]) -> str:
    """A vLLM load format that takes the weights from memory: no copy on disk, whatever their size."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    name = "balcaprl_memory"

    @register_model_loader(name)
    class MemoryLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            """There is nothing to download."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            model.load_weights(iter(tensors.items()))
            tensors.clear()  # vLLM's registry keeps this class, and must not keep a policy alive

    return name


def _inspect_in_process(architecture: str) -> None:
    """Hand vLLM the model class itself: it would start a whole Python process just to look at it."""
    from vllm.model_executor.models.registry import ModelRegistry

    if architecture not in ModelRegistry.models:
        raise RuntimeError(f"this vLLM does not know the architecture {architecture}: set rollout.sampler to hf")
    registered = ModelRegistry.models[architecture]
    if hasattr(registered, "load_model_cls"):
        ModelRegistry.register_model(architecture, registered.load_model_cls())


@contextlib.contextmanager
def _own_threads() -> Iterator[None]:
    """vLLM's CPU worker replaces ``torch.set_num_threads`` by a warning; the trainer keeps the real one."""
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)


@contextlib.contextmanager
def _untouched_random_state(device: torch.device) -> Iterator[None]:
    """vLLM seeds the global generators as it starts, and draws from torch's even for requests with a seed."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _prompt_seed(seed: int, index: int) -> int:
    """A seed for each prompt. vLLM adds 0, 1, ... to it for the group's completions, hence no plain sum."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(2))


def _collapse_runs(prompt_ids: Tensor, token_id: int) -> list[int]:
    """``prompt_ids`` with each run of ``token_id`` shortened to one."""
    ids = prompt_ids.tolist()
    return [each for i, each in enumerate(ids) if each != token_id or i == 0 or ids[i - 1] != token_id]


def _check_expansion(prompt: Prompt, expanded: Sequence[int]) -> None:
    expected = prompt.prompt_ids.tolist()
    if list(expanded) != expected:
        raise RuntimeError(
            f"sample {prompt.sample.sample_id}: vLLM expands the prompt to {len(expanded)} tokens, the policy's "
            f"processor to {len(expected)}, or to other ids: sampling and training would see different prompts. The "
            "versions of vLLM and transformers do not agree on this model's processor; set rollout.sampler to hf"
        )


def _sampled_logprobs(completion: Any) -> list[float]:
    return [step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)]
