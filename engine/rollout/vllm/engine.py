"""Runs a vLLM engine in this process, on a policy's weights.

Only this module imports vllm, and it does so only when an engine is made.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import tempfile
import warnings
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from balcaprl.config import SamplingConfig
from balcaprl.kernels.support.products import gapless
from balcaprl.policy import Policy
from balcaprl.policy.packing import is_per_token
from balcaprl.rollout.adapters import has_split_head, merged_tensors, served_name
from balcaprl.rollout.placeholders import collapsed, image_spans, inputs_hash
from balcaprl.rollout.sampler import instead_of_vllm
from balcaprl.rollout.vllm.cpu_ops import use_norms, use_rotation
from balcaprl.rollout.vllm.process import (
    not_bound_to_the_only_node,
    own_threads,
    set_environment,
    untouched_random_state,
)
from balcaprl.rollout.weights import CopyRecorder, StaleWeightsError, WeightPlan, make_plan
from balcaprl.torchvision_compat import ensure_importable
from balcaprl.types import Prompt


@dataclass(frozen=True)
class EngineLimits:
    """The sizes that an engine is made for."""

    max_model_len: int
    """Longest prompt with its completion, in tokens."""
    max_num_seqs: int
    """Largest number of completions that are decoded at once."""
    image_size: tuple[int, int] | None
    """Largest width and height of an image, in pixels; None for no images."""
    kv_cache_bytes: int
    """Size of the KV cache, in bytes."""
    gpu_memory_utilization: float = 0.4
    """Share of a GPU's memory that vLLM may take."""
    can_sleep: bool = False
    """Whether the KV cache's memory can be freed between rollouts; needs CUDA."""


@dataclass(frozen=True)
class Finished:
    """One finished request."""

    request_id: str
    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]


class VLLMEngine:
    """A running engine: its weights, its requests, its caches."""

    def __init__(self, policy: Policy, limits: EngineLimits, *, plain_weights: bool) -> None:
        """Load the engine from the policy's weights as they are now.

        Args:
            policy: The policy to sample from.
            limits: The sizes that the engine has to hold.
            plain_weights: Keep the engine's weights as ordinary tensors, which ``plan`` can map. Otherwise a CPU build
                repacks them for its own matrix products.
        """
        self.limits = limits
        self._policy, self._plain_weights = policy, plain_weights
        self._parameters = dict(policy.stock_model.named_parameters())
        self._recorder = CopyRecorder(self._parameters)
        with tempfile.TemporaryDirectory(prefix="balcaprl-vllm-") as folder:
            self._save_without_weights(folder)
            self._llm = self._load(folder)
        self._params_class, self._mm = _request_types()

    # --------------------------------------------------------------------------------------------------- weights

    @property
    def model(self) -> nn.Module:
        """vLLM's own model."""
        return self._llm.llm_engine.model_executor.driver_worker.worker.model_runner.model

    def plan(self) -> WeightPlan:
        """Make the plan of where this engine keeps the policy's parameters, as recorded while it loaded them."""
        return make_plan(self._parameters, self._recorder, self.model)

    def computes_from_plain_weights(self) -> bool:
        """Whether every linear layer reads its weight when it runs, and not a copy that was packed before."""
        packed = (getattr(module, "cpu_linear", _plain_linear) for module in self.model.modules())
        return all(each is _plain_linear or each is torch.nn.functional.linear for each in packed)

    def reload(self) -> tuple[int, int]:
        """Make vLLM load all of the policy's tensors again, with any repacking; returns (tensors, bytes)."""
        tensors = _named_tensors(self._policy)
        with _plain_cpu_linear() if self._plain_weights else contextlib.nullcontext():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})
        return len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def drop_caches(self) -> None:
        """Clear the caches of prefixes, preprocessed images and image features, which may come from the old weights.

        Raises:
            StaleWeightsError: A cache of prefixes or image features is not empty afterwards.
        """
        engine = self._llm.llm_engine
        engine.reset_prefix_cache()
        engine.reset_mm_cache()
        engine.reset_encoder_cache()
        held = {name: count for name, count in self.cached_entries().items() if count}
        if held:
            what = ", ".join(f"{count} in the {name} cache" for name, count in held.items())
            raise StaleWeightsError(f"vLLM still holds results of the old weights after a sync: {what}")

    def cached_entries(self) -> dict[str, int]:
        """Count the entries in each cache whose content depends on the weights."""
        core = self._llm.llm_engine.engine_core.engine_core
        scheduler = core.scheduler
        prefixes = scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block
        runner = core.model_executor.driver_worker.worker.model_runner
        return {
            "prefix": len(prefixes),
            "encoder": len(scheduler.encoder_cache_manager.cached) + len(runner.encoder_cache),
        }

    # --------------------------------------------------------------------------------------------------- requests

    def request(self, prompt: Prompt) -> dict[str, Any]:
        """Make a request with a prompt's expanded ids and preprocessed image, as the trainer has them.

        The request can be submitted any number of times.
        """
        if prompt.image_inputs:
            return self._preprocessed(prompt) or self._raw(prompt)
        return {"type": "token", "prompt_token_ids": prompt.prompt_ids.tolist()}

    def submit(self, request_id: str, request: dict[str, Any], params: Any) -> None:
        """Queue one completion."""
        self._llm.llm_engine.add_request(request_id, request, params)

    def params(self, sampling: SamplingConfig, seed: int | None) -> Any:
        """Make vLLM's sampling parameters for one completion; it is greedy if ``seed`` is None."""
        return self._params_class(
            temperature=0.0 if seed is None else sampling.temperature,
            max_tokens=sampling.max_completion_tokens,
            stop_token_ids=list(self._policy.eos_token_ids),
            ignore_eos=True,  # the tokenizer's own end token counts only if it is one of the policy's
            stop=list(sampling.stop) or None,
            seed=seed,
            logprobs=0,
            flat_logprobs=True,  # arrays instead of a dictionary of objects for each token
            detokenize=bool(sampling.stop),
        )

    def finished(self) -> Iterator[Finished]:
        """Run until every queued request is done, yielding each as it ends."""
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            # The generators' states are saved once for several steps: saving costs as much as a layer of a small model.
            with untouched_random_state(self._policy.device):
                done: list[Any] = []
                while not done and engine.has_unfinished_requests():
                    done = [output for output in engine.step() if output.finished]
            yield from map(_to_finished, done)

    def abort_all(self) -> None:
        """Abort every request that is not finished."""
        engine = self._llm.llm_engine
        states = engine.output_processor.request_states
        engine.abort_request(list(states), internal=True)
        while engine.has_unfinished_requests():
            engine.step()

    def _preprocessed(self, prompt: Prompt) -> dict[str, Any] | None:
        """Make a request with the trainer's own image tensors.

        Returns None if vLLM does not divide this family's images into one item per run of placeholders.
        """
        spans = image_spans(prompt.prompt_ids, self._policy.family.image_token_id(self._policy.model.config))
        processor = self._llm.llm_engine.renderer.get_mm_processor()
        length = len(prompt.prompt_ids)
        images = {key: value for key, value in prompt.image_inputs.items() if not is_per_token(key, value, length)}
        features = self._mm.BatchFeature(images)
        try:
            items = self._mm.MultiModalKwargsItems.from_hf_inputs(
                features, processor._get_mm_fields_config(features, {})
            )
        except (KeyError, ValueError):
            return None
        if len(items.get("image", ())) != len(spans):
            return None
        digest = inputs_hash(prompt.image_inputs)
        places = [self._mm.PlaceholderRange(offset=start, length=length) for start, length in spans]
        hashes = [f"{digest}-{index}" for index in range(len(spans))]
        return self._mm.mm_input(prompt.prompt_ids.tolist(), items, {"image": hashes}, {"image": places})

    def _raw(self, prompt: Prompt) -> dict[str, Any]:
        """Make a request with the raw image and one placeholder.

        vLLM preprocesses the image and expands the placeholder; the sampler compares the resulting prompt with its own.
        """
        ids = collapsed(prompt.prompt_ids, self._policy.family.image_token_id(self._policy.model.config))
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": prompt.image}}

    # --------------------------------------------------------------------------------------------------- life

    def sleep(self) -> bool:
        """Free the KV cache's memory but keep the weights; returns whether the memory was freed."""
        if not self.limits.can_sleep:
            return False
        self._llm.sleep(level=0)
        self._llm.llm_engine.release_kv_cache_memory()
        return True

    def wake_up(self) -> None:
        """Allocate the KV cache's memory again."""
        if self.limits.can_sleep:
            self._llm.wake_up(tags=["kv_cache", "scheduling"])

    @property
    def owns_weight_memory(self) -> bool:
        """Whether shutting the engine down unmaps the weights' memory, even while tensors still view it."""
        return self.limits.can_sleep

    def shutdown(self) -> None:
        """End the engine and free its memory. Views of its weights stay valid unless ``owns_weight_memory`` is true."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()
        gc.collect()

    def _save_without_weights(self, folder: str) -> None:
        """Write all that vLLM reads from a checkpoint folder, except the weights, which it gets from memory."""
        config = copy.deepcopy(self._policy.model.config)
        config.architectures = [self._architecture]
        if has_split_head(self._policy.stock_model):
            for part in (config, config.get_text_config()):
                part.tie_word_embeddings = False
        config.save_pretrained(folder)
        self._policy.processor.save_pretrained(folder)

    @property
    def _architecture(self) -> str:
        return type(self._policy.stock_model).__name__

    def _load(self, folder: str) -> Any:
        set_environment()
        ensure_importable()
        with own_threads(), untouched_random_state(self._policy.device), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            from vllm import LLM, EngineArgs

            _inspect_in_process(self._architecture, instead_of_vllm(self._policy))
            tensors = (_base_tensors if self._plain_weights else _named_tensors)(self._policy)
            known = {field.name for field in fields(EngineArgs)}
            # The policy's processor already normalises images; newer versions of vLLM would do so again in the model.
            optional: dict[str, Any] = {"mm_device_do_normalize": False} if "mm_device_do_normalize" in known else {}
            if self._policy.device.type == "cpu":
                optional |= _use_cpu_kernels(known)
            if self.limits.image_size is not None:
                width, height = self.limits.image_size
                optional["limit_mm_per_prompt"] = {"image": {"count": 1, "width": width, "height": height}}
            dtype: Any = str(self._policy.dtype).removeprefix("torch.")
            with (
                _plain_cpu_linear() if self._plain_weights else contextlib.nullcontext(),
                not_bound_to_the_only_node(),
            ):
                return LLM(
                    folder,
                    load_format=_register_memory_loader(tensors, self._recorder),
                    dtype=dtype,
                    enforce_eager=self._policy.device.type == "cpu",
                    max_model_len=self.limits.max_model_len,
                    max_num_seqs=self.limits.max_num_seqs,
                    max_num_batched_tokens=max(4096, self.limits.max_model_len),
                    logits_processors=[_ban(self._policy.banned_token_ids)],
                    logprobs_mode="processed_logprobs",
                    # A published checkpoint's sampling defaults, such as a repetition penalty, are not the policy's.
                    generation_config="vllm",
                    kv_cache_memory_bytes=self.limits.kv_cache_bytes,
                    gpu_memory_utilization=self.limits.gpu_memory_utilization,
                    enable_sleep_mode=self.limits.can_sleep,
                    use_tqdm_on_load=False,
                    disable_log_stats=True,
                    **optional,
                )


def _named_tensors(policy: Policy) -> dict[str, Tensor]:
    """Return every tensor of the policy by the name under which vLLM loads it, with adapters merged in."""
    rename = policy.family.published_name
    return {rename(policy.model.config, name): tensor for name, tensor in merged_tensors(policy.stock_model).items()}


def _base_tensors(policy: Policy) -> dict[str, Tensor]:
    """Return the tensors without adapters, as views of the trainer's own parameters, which the recorder recognises."""
    rename = policy.family.published_name
    named = {served_name(name): tensor.detach() for name, tensor in policy.stock_model.state_dict().items()}
    return {rename(policy.model.config, name): tensor for name, tensor in named.items() if name is not None}


def _to_finished(output: Any) -> Finished:
    (completion,) = output.outputs
    return Finished(
        request_id=output.request_id,
        prompt_ids=list(output.prompt_token_ids),
        token_ids=list(completion.token_ids),
        logprobs=list(completion.logprobs.logprobs),
    )


def _request_types() -> tuple[Any, Any]:
    """Import what requests are made of: vLLM's sampling parameters, and the types in a preprocessed request."""
    from types import SimpleNamespace

    from transformers import BatchFeature
    from vllm import SamplingParams
    from vllm.inputs import mm_input
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange
    from vllm.sampling_params import RequestOutputKind

    def params(**values: Any) -> Any:
        return SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **values)

    kinds = SimpleNamespace(
        BatchFeature=BatchFeature,
        MultiModalKwargsItems=MultiModalKwargsItems,
        PlaceholderRange=PlaceholderRange,
        mm_input=mm_input,
    )
    return params, kinds


def _ban(token_ids: Sequence[int]) -> type:
    """Make a vLLM logits processor class that makes ``token_ids`` impossible in every request.

    A logit bias would not suffice: vLLM clamps a bias to at least -100, which a large logit outweighs.
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
            """Do nothing: the ban is the same for all requests."""

    return BannedTokens


def _register_memory_loader(tensors: dict[str, Tensor], recorder: CopyRecorder) -> str:
    """Register a vLLM load format that reads the weights from memory while ``recorder`` watches; returns its name.

    This needs no copy of the weights on disk.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    name = "balcaprl_memory"
    hold = {"recorder": recorder}

    @register_model_loader(name)
    class MemoryLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            """Do nothing: there is nothing to download."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            with hold.pop("recorder"):
                model.load_weights(iter(tensors.items()))
            tensors.clear()  # vLLM's registry keeps this class, which must not keep a policy alive

    return name


def _plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(gapless(x), weight, bias)


@contextlib.contextmanager
def _plain_cpu_linear() -> Iterator[None]:
    """Within the context, vLLM's CPU backend leaves the weights of linear layers as they are.

    Otherwise it replaces each weight by a copy packed for oneDNN (or for AMX), which only a reload can change.
    """
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm

    def keep_weight(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = _plain_linear
        else:
            original(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = keep_weight
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = original


def _use_cpu_kernels(known_arguments: Container[str]) -> dict[str, Any]:
    """Make vLLM use more of its own kernels on a CPU, and return the engine arguments that this needs.

    Older versions of vLLM have no such argument, and keep their own norms.
    """
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    use_rotation(MRotaryEmbedding, op_registry_oot)
    if "ir_op_priority" not in known_arguments:
        return {}
    from vllm import ir

    return {"ir_op_priority": use_norms(ir.ops)}


def _inspect_in_process(architecture: str, instead: str) -> None:
    """Give vLLM the model class itself; otherwise vLLM starts another Python process just to inspect that class."""
    from vllm.model_executor.models.registry import ModelRegistry

    if architecture not in ModelRegistry.models:
        raise RuntimeError(f"this vLLM does not know the architecture {architecture}: {instead}")
    registered = ModelRegistry.models[architecture]
    if hasattr(registered, "load_model_cls"):
        ModelRegistry.register_model(architecture, registered.load_model_cls())
