"""Prepares this process for a vLLM engine, and restores what vLLM would change in it: threads and random state."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from balcaprl.logtext import leave_out

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
_HARMLESS = {
    # vLLM's build for CPUs does not use Triton
    "vllm.triton_utils.importing": "Triton is installed, but doesn't include CPU backend",
    # no video is ever sent, but vLLM makes up one when it measures its memory
    "transformers.models.qwen2_vl.video_processing_qwen2_vl": "Qwen2VL video processing does not apply the per-frame pixel cap",
}
"""Beginnings of messages to suppress, by logger, unless the user asks for vLLM's messages (VLLM_LOGGING_LEVEL)."""


def set_environment() -> None:
    """Set the environment variables that vLLM reads when it is imported, and suppress its harmless messages."""
    os.environ.update(_ENVIRONMENT)
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        for name, beginning in _HARMLESS.items():
            leave_out(name, beginning)
    for name, value in _ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)


@contextmanager
def not_bound_to_the_only_node() -> Iterator[None]:
    """Within the context, vLLM does not bind memory to a NUMA node if there is only one.

    Such a binding has no effect, but writes a message to standard error that no logger can suppress.
    """
    ops: Any = torch.ops._C
    try:
        is_needless = re.search(r"^Mems_allowed_list:\s*\d+$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        is_needless = None
    if not is_needless or not hasattr(ops, "init_cpu_memory_env"):
        yield
        return
    bind = ops.init_cpu_memory_env
    ops.init_cpu_memory_env = lambda _nodes: None
    try:
        yield
    finally:
        ops.init_cpu_memory_env = bind


@contextmanager
def own_threads() -> Iterator[None]:
    """Restore ``torch.set_num_threads`` and the number of threads at the end of the context.

    vLLM's CPU worker replaces the function by one that only warns.
    """
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)


@contextmanager
def untouched_random_state(device: torch.device) -> Iterator[None]:
    """Restore the global random state at the end of the context.

    vLLM seeds the global generators when it starts, and draws from torch's even for requests with a seed.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
