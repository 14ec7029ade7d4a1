"""Counts and times, on a CPU, what one update costs the host of a GPU.

    python bench/host_cost.py                      # counts and times of each part, ours beside the stock code
    python bench/host_cost.py --check              # only counts

The code takes the same path as on a GPU, but Triton's launches do nothing, and layers are so narrow that their products
take next to no time. What is left is the work of the host: Python, checks, dispatch and autograd. ``operations`` is the
number of operations that torch dispatches, without views and allocations, plus the number of Triton's launches, in
forward and backward together. It is close to the number of launches on a GPU. Times are in microseconds, each the
smallest over interleaved rounds, and do not contain what a driver adds to a launch. The exit status is 1 if a number of
operations exceeds its bound.

========== =============================================================================================================
decoder    a decoder layer on packed groups, beside transformers' own on a padded batch with PyTorch's attention
tower      a block of Qwen2.5-VL's image tower, beside transformers' own with one attention call per segment length
attention  shared-prefix attention, beside PyTorch's attention on a padded batch
update     pack, forward and backward of one group on a model with as many layers as Qwen2.5-VL-3B: only operations
========== =============================================================================================================
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from update import providers
from update.providers import SIZES, Shape, build_policy, make_rollouts

from balcaprl.kernels import SharedPrefixLayout, shared_prefix_attention
from balcaprl.kernels.support import deferred, launch
from balcaprl.policy import Policy
from balcaprl.policy.layers import blocks
from balcaprl.policy.layers.attention import IMAGE_SEGMENTS, SHARED_PREFIX, using_attention
from balcaprl.policy.layers.fused import stock_layers

BOUNDS = {"decoder": 32, "tower": 31, "update": 2300}
"""Largest number of operations that our code may take for each part."""
ROUNDS = 30
NARROW = {"hidden": 64, "inner": 128, "layers": 36, "heads": 4, "kv": 2, "vocabulary": 256, "tower": 64, "blocks": 32}
"""As many layers as Qwen2.5-VL-3B has, but so narrow that the CPU has almost nothing to compute."""
CHOOSERS = ("shared_prefix.attention", "head.linear_policy_loss")
"""The modules of the ops that choose an implementation in an update."""
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
Call = Callable[[], Any]


class Operations(TorchDispatchMode):
    """Counts in ``number`` the operations that torch dispatches, without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        self.number += not (views or func._schema.name.removeprefix("aten::") in ALLOCATIONS)
        return func(*args, **(kwargs or {}))


class Launches:
    """Takes the place of Triton's launches, and counts them in ``number``."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, *_: Any, **__: Any) -> None:
        self.number += 1


@contextmanager
def as_on_a_gpu() -> Iterator[Launches]:
    """Within the context, layers, attention and head take the path of a GPU, and Triton's launches are only counted."""
    from triton.runtime.jit import JITFunction

    launches = Launches()
    ops = [importlib.import_module(f"balcaprl.kernels.{name}") for name in CHOOSERS]
    with (
        mock.patch.object(JITFunction, "run", launches),
        mock.patch.object(launch, "check_triton", return_value=None),
        mock.patch.object(blocks, "can_run", return_value=True),
        mock.patch.object(blocks, "agrees", return_value=True),
        mock.patch.object(ops[0], "resolve_impl", return_value="triton"),
        mock.patch.object(ops[1], "resolve_impl", return_value="triton"),
        mock.patch.object(deferred, "check"),
        mock.patch.object(blocks.SegmentAttention, "forward", _segments_forward),
        mock.patch.object(blocks.SegmentAttention, "backward", _segments_backward),
    ):
        yield launches


def _segments_forward(self: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Dispatches one operation, as PyTorch's varlen attention does, which does not run on a CPU."""
    kept = (query.new_empty(1), query.new_empty(1), query.new_empty(1))
    return query.clone(memory_format=torch.contiguous_format), kept


def _segments_backward(
    self: Any, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    grads = torch.empty((3, *query.shape), dtype=query.dtype).unbind()
    return grads[0], grads[1][None], grads[2][None]


def parts(policy: Policy) -> dict[str, dict[str, Call]]:
    """Returns for each part our code and the stock code, each as a function that runs forward and backward."""
    decoder, block = policy.text_model.layers[0], policy.stock_model.model.visual.blocks[0]
    text, tower = policy.text_model.config, policy.stock_model.model.visual.config
    layout = SharedPrefixLayout.from_lengths([281], [[32] * 8])
    packed, padded = angles(layout.num_tokens, 16), angles(64, 16)
    offsets = torch.tensor([0, 64, 128, 192, 256], dtype=torch.int32)
    of_tower = {"cu_seqlens": offsets, "max_seqlen": 64, "position_embeddings": angles(256, 16)}
    prefix = {"attention_mask": None, "prefix_layout": layout, "position_embeddings": tuple(x[None] for x in packed)}
    plain = {"attention_mask": None, "position_embeddings": tuple(x[None].expand(8, -1, -1) for x in padded)}
    heads = [torch.randn(layout.num_tokens, n, 16).requires_grad_() for n in (4, 2, 2)]
    rows = [torch.randn(8, n, 64, 16).requires_grad_() for n in (4, 2, 2)]
    return {
        "decoder": {
            "ours": module_call(decoder, torch.randn(1, layout.num_tokens, 64), prefix, text, SHARED_PREFIX),
            "stock": stock_call(decoder, torch.randn(8, 64, 64), plain, text, "sdpa"),
        },
        "tower": {
            "ours": module_call(block, torch.randn(256, 64), of_tower, tower, IMAGE_SEGMENTS),
            "stock": stock_call(block, torch.randn(256, 64), of_tower, tower, IMAGE_SEGMENTS),
        },
        "attention": {
            "ours": lambda: shared_prefix_attention(*heads, layout).sum().backward(),
            "stock": lambda: F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).sum().backward(),
        },
    }


def angles(num_rows: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (num_rows, head_dim)."""
    each = torch.randn(num_rows, head_dim // 2).repeat(1, 2)
    return each.cos(), each.sin()


def module_call(module: nn.Module, rows: Tensor, options: dict[str, Any], config: Any, attention: str) -> Call:
    """A function that runs a module's forward and backward with the named attention, after dropping old gradients."""
    rows, above = rows.requires_grad_(), torch.randn_like(rows)

    def call() -> None:
        for leaf in (rows, *module.parameters()):
            leaf.grad = None
        with using_attention(config, attention):
            module(rows, **options).backward(above)

    return call


def stock_call(module: nn.Module, *arguments: Any) -> Call:
    """The function of ``module_call``, run on transformers' own code."""
    call = module_call(module, *arguments)

    def on_stock_code() -> None:
        with stock_layers(module):
            call()

    return on_stock_code


def operations_of(call: Call, launches: Launches) -> int:
    """Number of operations and launches of one call, after a first call that may fill caches."""
    call()
    before = launches.number
    with Operations() as counted:
        call()
    return counted.number + launches.number - before


def times_of(calls: dict[str, Call]) -> dict[str, float]:
    """Microseconds of each call, the smallest over interleaved rounds."""
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            least[name] = min(least[name], 1e6 * (time.perf_counter() - begin))
    return least


def update_call(policy: Policy, size: str) -> Call:
    """A function that packs one group and runs forward and backward on it."""
    rollouts = make_rollouts(Shape(size, 8, 64, 16), policy)
    forward = providers.PROVIDERS["ours"](policy, rollouts)

    def call() -> None:
        policy.model.zero_grad(set_to_none=True)
        forward().backward()

    return call


def rows(with_times: bool) -> Iterator[dict[str, Any]]:
    """Yields one row for each part."""
    with as_on_a_gpu() as launches:
        SIZES["narrow"] = NARROW
        with mock.patch("balcaprl.policy.policy.check_agreement", return_value=None):  # nothing is computed here
            policy = build_policy("narrow", torch.device("cpu"), torch.float32)
        for part, calls in parts(policy).items():
            row = {"part": part, **{f"operations_{n}": operations_of(call, launches) for n, call in calls.items()}}
            if with_times:
                row |= {f"us_{name}": round(us, 1) for name, us in times_of(calls).items()}
            yield row | {"bound": BOUNDS.get(part)}
        yield {
            "part": "update",
            "operations_ours": operations_of(update_call(policy, "narrow"), launches),
            "bound": BOUNDS["update"],
        }


def main() -> None:
    """Prints one JSON object per part, and exits with 1 if a part takes more operations than its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="count, compare with the bounds, and time nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    exceeded = []
    for row in rows(with_times=not options.check):
        print(json.dumps(row), flush=True)
        if row["bound"] is not None and row["operations_ours"] > row["bound"]:
            exceeded.append(row["part"])
    if exceeded:
        raise SystemExit(f"more operations than allowed: {', '.join(exceeded)}")


if __name__ == "__main__":
    main()
