"""Checks at load that the policy computes what the model itself computes, and that a prompt shows the model its image.

The model's own ``generate`` continues a text by a few greedy tokens and, where the processor takes images, does the
same for a prompt with a small picture. Its logits are compared with those of the packed forward and the policy's head,
over all ids of the tokenizer. The comparison shows whatever a model does beyond ``hidden @ W.T``: capped or scaled
logits, adapters, other masks or positions. It takes less time than loading the weights, and leaves torch's random state
unchanged.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from balcaprl.policy.head import Head, LogitRule, head_module
from balcaprl.policy.layers.fused import stock_layers
from balcaprl.policy.packing import Group

if TYPE_CHECKING:
    from balcaprl.policy.policy import Policy

logger = logging.getLogger(__name__)

_NUM_TOKENS = 3
"""Number of tokens that the model generates for one comparison."""
_ROUNDING = 2e-3
"""Largest log-probability difference that rounding in float32 or float64 explains, in nats; measured: 1e-6 to 1e-4."""
_ROUNDING_HALF = 0.15
"""Largest mean log-probability difference that rounding in half precision explains, in nats."""
_INSTRUCTION = "Describe the image."
_LOGIT_FIELDS = re.compile(r"logit|lm_head|softcap|mup|multiplier|output_mult")
_HEAD_LEVELS = (1.0, 100.0)
"""Largest absolute logit of each hidden state that the head is tried on; only large logits show the effect of a cap."""


class PolicyMismatchError(ValueError):
    """The policy would train a different distribution from the model's own."""


def check_agreement(policy: Policy) -> None:
    """Find how the model scales or caps its logits, then compare policy and model as this module's docstring describes.

    Raises:
        PolicyMismatchError: The two differ; the message says by how much, and what may cause it.
    """
    with torch.no_grad(), _untouched_random_state(policy.device):
        policy.logit_rule = _find_logit_rule(policy)
        _compare(policy, _text(policy), "a text")
        if takes_images(policy):
            _compare(policy, _picture(policy), "an image")


def takes_images(policy: Policy) -> bool:
    """Whether prompts with images can be made: the model takes images, and its processor is loaded."""
    from transformers import ProcessorMixin

    return policy.family.image_token_id(policy.model.config) >= 0 and isinstance(policy.processor, ProcessorMixin)


# ------------------------------------------------------------------------------------------------- the head


def _find_logit_rule(policy: Policy) -> LogitRule:
    """Find how the model turns its head's product into logits: unchanged, or by a configured scale, cap or both."""
    module = head_module(policy.model)
    if module is None or getattr(policy.stock_model, "model", None) is None:
        raise PolicyMismatchError(f"{_name(policy)}: it has no head on one decoder (get_output_embeddings, model)")
    plain = Head(module, LogitRule(), policy.lm_head_weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    width = policy.lm_head_weight.shape[1]
    hidden = torch.randn(len(_HEAD_LEVELS), width, generator=generator).to(policy.device, policy.dtype)
    levels = torch.tensor(_HEAD_LEVELS, device=policy.device)[:, None]
    hidden *= (levels / plain.logits(hidden).float().abs().amax(-1, keepdim=True)).to(hidden.dtype)
    raw, expected = plain.logits(hidden).double(), _logits_of(policy, hidden).double()
    numbers = _configured_numbers(policy.model.config)
    scales = [1.0, *numbers.values(), *(1 / number for number in numbers.values())]
    rules = [LogitRule(scale, cap) for cap in (None, *numbers.values()) for scale in scales]
    tolerance = max(1e-4, 16 * torch.finfo(policy.dtype).eps)

    def error(rule: LogitRule) -> float:
        """Largest error of any row, relative to the row's largest logit."""
        found = (rule(raw) - expected).abs().amax(-1) / expected.abs().amax(-1)
        return float(found.nan_to_num(torch.inf).max())

    best = next((rule for rule in rules[:1] if error(rule) <= tolerance), None) or min(rules, key=error)
    if error(best) > tolerance:
        raise PolicyMismatchError(
            f"{_name(policy)}: its logits are not its head's product with a scale or a cap, they differ by "
            f"{float((raw - expected).abs().max()):.3g}{_told(numbers)}; such a head is not supported"
        )
    if best != LogitRule():
        logger.info(
            "%s: logits are scaled by %g, capped at %s", policy.model.config.model_type, best.scale, best.softcap
        )
    return best


def _logits_of(policy: Policy, hidden: Tensor) -> Tensor:
    """Run the model on a text, replace its last hidden states by ``hidden`` (N, D), and return the logits (N, V)."""

    def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
        output.last_hidden_state = hidden[None].to(output.last_hidden_state.dtype)
        return output

    ids = _plain_ids(policy, len(hidden))
    handle = policy.stock_model.model.register_forward_hook(replace)
    try:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, "return_dict": True}
        return policy.stock_model(**inputs).logits[0]
    except Exception as error:  # foreign code can fail in any way, for example because it needs an image
        raise PolicyMismatchError(
            f"{_name(policy)}: it cannot run on a text alone, so its head cannot be compared: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        handle.remove()


def _configured_numbers(config: Any) -> dict[str, float]:
    """Positive numbers that the configurations of the model and its text model hold about logits, by field name."""
    found = {}
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and value > 0 and _LOGIT_FIELDS.search(name):
                found[name] = float(value)
    return found


# ------------------------------------------------------------------------------------------- the whole model


def _compare(policy: Policy, inputs: Mapping[str, Any], what: str) -> None:
    """Raise PolicyMismatchError unless the packed forward agrees with the model's own generation."""
    try:
        expected, completion = _generate(policy, inputs)
    except Exception as error:  # foreign code can fail in any way, even on its own processor's output
        raise PolicyMismatchError(
            f"{_name(policy)}: the model itself cannot generate from {what} that its processor and chat template prepared: "
            f"{type(error).__name__}: {error}"
        ) from error
    prompt_ids = inputs["input_ids"][0].cpu()
    extra = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask", "labels")}
    group = Group(prompt_ids, [completion, completion[:-1]], policy.image_inputs(prompt_ids, extra), "check at load")
    longest = len(prompt_ids) + len(completion)
    layouts = ("repeated",) if policy.sharing_obstacle(longest) else ("shared", "repeated")
    expected = torch.cat([expected, expected[:-1]])[:, : policy.num_tokens].log_softmax(-1)
    for layout in layouts:
        hidden = policy.hidden_states(policy.pack([group], layout))  # type: ignore[arg-type]
        found = policy.sampled_head.logits(hidden).to(expected.dtype).log_softmax(-1)
        difference = (found - expected).abs()
        exact = policy.dtype in (torch.float32, torch.float64)
        agrees = difference.max() <= _ROUNDING if exact else difference.mean() <= _ROUNDING_HALF
        if not agrees:
            raise PolicyMismatchError(
                f"{_name(policy)}: with {what} in the prompt its own log-probabilities and the policy's differ by up to "
                f"{float(difference.max()):.3g} nats (mean {float(difference.mean()):.3g}), {layout} prompts: training would "
                f"learn another distribution than the model's{_likely_cause(policy)}"
            )


def _generate(policy: Policy, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Generate a few greedy tokens with the model itself; returns their logits (T, V) and the tokens (T,)."""
    from transformers import GenerationConfig

    unwanted = sorted({*policy.banned_token_ids, *_ends(policy)})
    config = GenerationConfig(
        max_new_tokens=_NUM_TOKENS,
        suppress_tokens=unwanted or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
    )
    on_device = {k: v.to(policy.device) if isinstance(v, Tensor) else v for k, v in inputs.items() if k != "labels"}
    with stock_layers(policy.stock_model), _generation_config(policy.stock_model, config):
        output = policy.stock_model.generate(**on_device)
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].cpu()
    return torch.cat(output.logits).to(torch.promote_types(output.logits[0].dtype, torch.float32)), tokens


@contextmanager
def _generation_config(model: Any, config: Any) -> Iterator[None]:
    """Use ``config`` within the context, because the checkpoint's own may ask for beams, penalties or its own cache."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


def _text(policy: Policy) -> dict[str, Tensor]:
    ids = _plain_ids(policy, 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # Without token_type_ids, some models let the prompt attend to its completion too.
    takes_types = "token_type_ids" in inspect.signature(policy.stock_model.forward).parameters
    return inputs | {"token_type_ids": torch.zeros_like(ids)} if takes_types else inputs


def _plain_ids(policy: Policy, count: int) -> Tensor:
    """Ids (1, count) of ordinary tokens, spread over the vocabulary."""
    unwanted = {*policy.banned_token_ids, *_ends(policy)}
    step = max(1, policy.num_tokens // (2 * count))
    plain = [token for token in range(step, policy.num_tokens, step) if token not in unwanted]
    return torch.tensor([plain[:count]], device=policy.device)


def _ends(policy: Policy) -> tuple[int, ...]:
    try:
        return policy.eos_token_ids
    except (ValueError, AttributeError):  # there is no end-of-sequence id or no tokenizer; a sampler reports it later
        return ()


def _picture(policy: Policy) -> Mapping[str, Any]:
    """Prepare a prompt with a small picture, with the chat template and the processor.

    Raises:
        PolicyMismatchError: The template is missing, fails, or leaves out the image or the instruction.
    """
    from PIL import Image

    if not (getattr(policy.processor, "chat_template", None) or getattr(policy.tokenizer, "chat_template", None)):
        raise PolicyMismatchError(
            f"{_name(policy)}: the checkpoint has no chat template, so it is not known how to ask it: put the template of "
            "the model's authors into its folder as chat_template.jinja"
        )
    image = Image.linear_gradient("L").resize((112, 84)).convert("RGB")
    told = "the checkpoint's chat template (chat_template.jinja)"
    try:
        text, inputs = policy.process(image, _INSTRUCTION)
    except Exception as error:  # templates and processors are foreign code and can fail in any way
        raise PolicyMismatchError(
            f"{_name(policy)}: {told} and its processor cannot prepare one image and an instruction: "
            f"{type(error).__name__}: {error}"
        ) from error
    ids, token = inputs["input_ids"][0], policy.family.image_token_id(policy.model.config)
    found = int((ids == token).sum())
    expected = policy.family.num_image_tokens(policy.stock_model, policy.image_inputs(ids, inputs))
    if not found or expected not in (None, found):
        needed = "at least 1" if expected is None else expected
        raise PolicyMismatchError(
            f"{_name(policy)}: {told} makes a prompt with {found} image placeholders (id {token}) of a message with one image, "
            f"which needs {needed}: the model would not see the image. The template must take content that is a list of "
            f"parts and write the placeholder for a part of type image; it made {text[:200]!r}"
        )
    if _INSTRUCTION.casefold() not in text.casefold():
        raise PolicyMismatchError(
            f"{_name(policy)}: {told} drops the instruction: of {_INSTRUCTION!r} it made {text[:200]!r}"
        )
    return inputs


def _likely_cause(policy: Policy) -> str:
    causes = []
    if not policy.head.is_linear:
        causes.append("a head that is no plain matrix")
    if any(hasattr(module, "get_delta_weight") for module in policy.model.modules()):
        causes.append("an adapter on a layer that this package computes itself")
    if not policy.family.is_known:
        causes.append("inputs or masks of this family that a whole forward does not get")
    return (f"; likely causes: {', '.join(causes)}" if causes else "") + _told(_configured_numbers(policy.model.config))


def _told(numbers: Mapping[str, float]) -> str:
    listed = ", ".join(f"{name} = {number:g}" for name, number in numbers.items())
    return f"; its configuration says {listed}" if listed else ""


def _name(policy: Policy) -> str:
    return f"model_type {policy.model.config.model_type!r}"


@contextmanager
def _untouched_random_state(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
