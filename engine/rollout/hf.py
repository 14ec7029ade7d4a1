"""Samples with the policy's own transformers model.

``model.generate`` is not used, because it would run the image tower and the prompt once per completion and take random
numbers from the global generator. It would also either keep scores (T, V) or not report the sampled distribution. Here
every prompt is prefilled once, its KV cache is repeated for the group, and each step drops its logits after sampling.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from balcaprl.config import SamplingConfig
from balcaprl.policy import Policy
from balcaprl.policy.forward import text_inputs
from balcaprl.policy.packing import merge_image_inputs
from balcaprl.rollout.sampler import Draw, PolicySampler, check_context, check_request, first_stop, make_rollouts
from balcaprl.types import DivergedError, Prompt, SyncReport


class HFRollout(PolicySampler):
    """A sampler that needs only transformers, and reads the trainer's weights in place."""

    name = "hf"

    def stream(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingConfig, *, seed: int, greedy: bool = False
    ) -> Iterator[Draw]:
        """Sample completions, and yield each as soon as it ends. See ``Sampler.stream``."""
        check_request(prompts, group_size)
        check_context(self._policy, prompts, sampling)
        yield from self._sample(prompts, group_size, sampling, None if greedy else seed)

    @torch.no_grad()
    def _sample(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingConfig, seed: int | None
    ) -> Iterator[Draw]:
        pick = _TokenPicker(self._policy, 1.0 if seed is None else sampling.temperature, seed)
        decoder = _Decoder(self._policy, prompts)
        hidden = decoder.prefill(group_size)
        ends = torch.tensor(self._policy.eos_token_ids, device=hidden.device)
        running = torch.ones(len(prompts) * group_size, dtype=torch.bool, device=hidden.device)
        drawn = _Drawn(len(running), sampling.max_completion_tokens)
        owed = set(range(len(running)))
        for step in range(sampling.max_completion_tokens):
            token, logprob = pick(hidden)
            drawn.add(token, logprob)
            running = running & ~torch.isin(token, ends)
            if sampling.stop:
                running = running & ~self._at_stop(drawn.tokens, sampling.stop).to(running.device)
            is_last = step + 1 == sampling.max_completion_tokens
            still = running.tolist()
            ended = sorted(row for row in owed if is_last or not still[row])
            owed.difference_update(ended)
            rollouts = make_rollouts(self._policy, *drawn.rows(ended), sampling.stop) if ended else []
            for row, rollout in zip(ended, rollouts, strict=True):
                yield Draw(*divmod(row, group_size), rollout)
            if not owed:
                return
            hidden = decoder.advance(token)

    def _at_stop(self, tokens: Tensor, stop: Sequence[str]) -> Tensor:
        """Find out which rows of ids (R, N) already contain a stop text; returns a BoolTensor (R,)."""
        texts = self._policy.tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True)
        return torch.tensor([first_stop(text, stop) is not None for text in texts])

    def sync(self, policy_version: int) -> SyncReport:
        """Only take over the version, because sampler and trainer share one set of weights. See ``Sampler.sync``."""
        self.policy_version = policy_version
        return SyncReport("shared", 0, 0, 0.0, policy_version)

    def close(self) -> None:
        """Do nothing, because the sampler holds no resources. See ``Sampler.close``."""


class _Drawn:
    """The tokens (R,) that each step has sampled so far, with their log-probabilities."""

    def __init__(self, num_rows: int, max_tokens: int) -> None:
        self._tokens = torch.empty(num_rows, max_tokens, dtype=torch.long)
        self._logprobs = torch.empty(num_rows, max_tokens, dtype=torch.float64)
        self._steps = 0

    @property
    def tokens(self) -> Tensor:
        """LongTensor (R, steps): all ids sampled so far."""
        return self._tokens[:, : self._steps]

    def add(self, token: Tensor, logprob: Tensor) -> None:
        """Append the ids (R,) and log-probabilities (R,) of one step."""
        self._tokens[:, self._steps], self._logprobs[:, self._steps] = token, logprob
        self._steps += 1

    def rows(self, rows: list[int]) -> tuple[list[list[int]], list[list[float]]]:
        """Return the ids and log-probabilities of some rows, up to the present step."""
        return self.tokens[rows].tolist(), self._logprobs[rows, : self._steps].tolist()


class _TokenPicker:
    """Turns hidden states (R, D) into sampled ids (R,) and their log-probabilities (R,); greedy without a seed."""

    def __init__(self, policy: Policy, temperature: float, seed: int | None) -> None:
        self._head = policy.head
        self._banned = list(policy.banned_token_ids)
        self._temperature = temperature
        self._generator = None if seed is None else torch.Generator(policy.device).manual_seed(seed)

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._head.logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self._temperature
        logits[:, self._banned] = -torch.inf
        logprobs = logits.log_softmax(-1)
        if self._generator is None:
            token = logprobs.argmax(-1, keepdim=True)
        else:
            token = self._draw(logprobs, self._generator)
        return token[:, 0], logprobs.gather(-1, token)[:, 0]

    @staticmethod
    def _draw(logprobs: Tensor, generator: torch.Generator) -> Tensor:
        try:
            return torch.multinomial(logprobs.exp(), 1, generator=generator)
        except RuntimeError as error:  # checked only on a CPU: after such an error CUDA cannot be used
            if logprobs.is_cpu and logprobs.isnan().any():
                raise DivergedError(
                    "the policy's next-token distribution is not finite: its weights are damaged"
                ) from error
            raise


class _Decoder:
    """Left-padded prompts, their KV cache, and the rotary position of each row's next token."""

    def __init__(self, policy: Policy, prompts: Sequence[Prompt]) -> None:
        from transformers import DynamicCache

        self._policy = policy
        self._prompts = prompts
        self._cache = DynamicCache()
        self._cache_argument = _cache_argument(policy.text_model)
        self._num_axes = 1
        self._mask = torch.zeros(0)
        self._next_position = torch.zeros(0)

    def prefill(self, group_size: int) -> Tensor:
        """Run each prompt once and repeat its KV cache; returns hidden states (R, D) that predict the first tokens."""
        policy, device = self._policy, self._policy.device
        width = max(len(prompt.prompt_ids) for prompt in self._prompts)
        tokens = torch.full((len(self._prompts), width), policy.pad_token_id)
        self._mask = torch.zeros_like(tokens)
        all_positions = [policy.prompt_positions(p.prompt_ids, p.image_inputs) for p in self._prompts]
        self._num_axes = all_positions[0].shape[0]
        positions = torch.zeros((self._num_axes, *tokens.shape), dtype=torch.long)
        for row, prompt in enumerate(self._prompts):
            start = width - len(prompt.prompt_ids)
            tokens[row, start:] = prompt.prompt_ids
            self._mask[row, start:] = 1
            positions[:, row, start:] = all_positions[row]
        self._next_position = (positions.amax((0, 2)) + 1).repeat_interleave(group_size).to(device)
        is_image = (tokens == policy.family.image_token_id(policy.model.config)) & self._mask.bool()
        image_index = is_image.flatten().nonzero()[:, 0].to(device)
        image_inputs = merge_image_inputs([prompt.image_inputs for prompt in self._prompts], device)
        feature_index = torch.arange(len(image_index), device=device)
        self._mask = self._mask.to(device)
        inputs = text_inputs(policy, tokens.to(device), image_index, feature_index, image_inputs)
        hidden = self._run(inputs, positions.to(device))
        self._cache.batch_repeat_interleave(group_size)
        self._mask = self._mask.repeat_interleave(group_size, 0)
        return hidden.repeat_interleave(group_size, 0)

    def advance(self, token: Tensor) -> Tensor:
        """Append one id to each row, from ids (R,); returns hidden states (R, D) that predict the next ids."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(token), 1)], 1)
        positions = self._next_position[None, :, None].expand(self._num_axes, -1, -1)
        self._next_position = self._next_position + 1
        return self._run({"inputs_embeds": self._policy.model.get_input_embeddings()(token[:, None])}, positions)

    def _run(self, inputs: dict[str, Any], positions: Tensor) -> Tensor:
        output = self._policy.text_model(
            **inputs,
            position_ids=self._policy.family.position_ids(positions),
            attention_mask=self._mask,
            use_cache=True,
            **{self._cache_argument: self._cache},
        )
        return output.last_hidden_state[:, -1]


def _cache_argument(text_model: Any) -> str:
    """Return the name of the model's cache argument: newer models call it ``cache`` and warn about the older name."""
    return "cache" if "cache" in inspect.signature(text_model.forward).parameters else "past_key_values"
