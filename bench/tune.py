"""Times rows for the launch tables on this machine's GPU: first the present rows, then the candidates.

python bench/tune.py                                     # every kernel that has candidates, to standard output
python bench/tune.py --kernel _head_stats_kernel         # one; may be repeated
python bench/tune.py --screen 90                         # no GPU: compile the candidates, show registers, spills, shared memory

The rows of ``launch.TABLES`` are chosen by these times. Each worker process takes the candidates with the same index of
all kernels of an op, so that candidates compile in parallel. A lock lets only one worker measure at a time. A figure is
the median time of the kernel's launches in one run of the op, without the op's other kernels, measured by CUDA events.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from balcaprl import kernels
from balcaprl.kernels.support import launch
from balcaprl.kernels.support.launch import Launch, _tile

ROUNDS = 7
Work = Callable[[], object]


def _attention(block_m: int, block_n: int, warps: int, stages: int) -> Launch:
    return Launch({"BLOCK_M": block_m, "BLOCK_N": block_n}, warps, stages)


def _stream(columns: int, warps: int) -> Launch:
    return Launch({"BLOCK_V": columns}, warps)


def _rows(make: Callable[..., Launch], *settings: tuple[int, ...]) -> list[Launch]:
    return [make(*each) for each in settings]


_LOGITS_TILES = _rows(
    _tile,
    (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4),
    (128, 128, 64, 4, 4), (128, 128, 64, 8, 5), (128, 128, 128, 8, 3), (64, 256, 64, 4, 4), (64, 256, 64, 8, 4),
    (128, 256, 32, 8, 5), (128, 256, 32, 8, 4), (256, 128, 32, 8, 5),
)  # fmt: skip
CANDIDATES: dict[str, list[Launch]] = {
    "_head_stats_kernel": _LOGITS_TILES,
    "_head_grad_logits_kernel": _LOGITS_TILES,
    "_logits_stats_kernel": _rows(
        _stream,
        (1024, 4), (1024, 2), (2048, 2), (4096, 4),
        (2048, 8), (512, 2),
    ),
    "_logits_gradient_kernel": _rows(
        _stream,
        (4096, 4), (2048, 2), (1024, 2), (1024, 4),
        (2048, 8), (512, 2),
    ),
    "_shared_prefix_fwd_kernel": _rows(
        _attention,
        (128, 64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3),
        (64, 128, 4, 2), (128, 32, 8, 4), (128, 64, 4, 3),
    ),
    "_shared_prefix_dq_kernel": _rows(
        _attention,
        (128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3),
        (64, 128, 4, 2), (128, 32, 8, 3), (64, 128, 8, 2),
    ),
    "_shared_prefix_dkdv_kernel": _rows(
        _attention,
        (64, 128, 8, 2), (64, 128, 8, 1), (64, 64, 8, 2), (64, 64, 4, 2),
        (32, 64, 4, 2), (64, 128, 8, 3), (32, 128, 8, 1), (32, 128, 4, 2),
    ),
}  # fmt: skip


# The work that is timed: forward and backward of an op at a real size.


def _head_work() -> Work:
    """The fused loss on Qwen2.5-VL-7B's head with 8192 tokens."""
    tokens, width, vocabulary = 8192, 3584, 152_064
    hidden = torch.randn(tokens, width, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, width, device="cuda").bfloat16().mul_(width**-0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device="cuda")
    rollouts = (torch.randn(8, device="cuda"), torch.arange(0, tokens + 1, tokens // 8, device="cuda").int())

    def run() -> object:
        loss = kernels.linear_policy_loss(hidden, weight, targets, None, *rollouts, impl="triton").loss
        return torch.autograd.grad(loss, (hidden, weight))

    return run


def _logits_work() -> Work:
    """The loss on logits of 4096 tokens over Qwen2.5-VL-3B's vocabulary."""
    tokens, vocabulary = 4096, 151_936
    logits = torch.randn(tokens, vocabulary, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device="cuda")
    rollouts = (torch.randn(8, device="cuda"), torch.arange(0, tokens + 1, tokens // 8, device="cuda").int())

    def run() -> object:
        loss = kernels.logits_policy_loss(logits, targets, None, *rollouts, impl="triton").loss
        return torch.autograd.grad(loss, (logits,))

    return run


def _attention_work() -> Work:
    """The attention with Qwen2.5-VL-7B's heads on 8 prompts of 1049 tokens with 8 completions of 256 tokens each."""
    layout = kernels.SharedPrefixLayout.from_lengths([1049] * 8, [[256] * 8] * 8, device="cuda")
    query, upstream = (torch.randn(layout.num_tokens, 28, 128, device="cuda").bfloat16() for _ in range(2))
    key, value = (torch.randn(layout.num_tokens, 4, 128, device="cuda").bfloat16() for _ in range(2))
    inputs = [x.requires_grad_() for x in (query, key, value)]

    def run() -> object:
        return torch.autograd.grad(kernels.shared_prefix_attention(*inputs, layout, impl="triton"), inputs, upstream)

    return run


WORK = {"_head": _head_work, "_logits": _logits_work, "_shared_prefix": _attention_work}
"""The work for each prefix of kernel names."""


class _Stopwatch:
    """Times every Triton launch with CUDA events and keeps the events by the kernel's name."""

    def __init__(self) -> None:
        from triton.runtime.jit import JITFunction

        self.launches: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)
        run = JITFunction.run

        def timed(kernel: Any, *arguments: Any, **options: Any) -> Any:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = run(kernel, *arguments, **options)
            end.record()
            self.launches[kernel.fn.__name__].append((begin, end))
            return result

        JITFunction.run = timed

    def milliseconds(self, kernel: str) -> float:
        """Total milliseconds of a kernel's launches since ``launches`` was last cleared."""
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self.launches[kernel])


def measure(prefix: str, index: int | None, chosen: list[str], lock: str) -> list[dict[str, Any]]:
    """Times each chosen kernel of one piece of work within a forward and backward; returns one row per kernel.

    Every kernel uses its candidate number ``index``, or with None its row of the launch tables.
    """
    names = [k for k in chosen if k.startswith(prefix)]
    if index is not None:
        names = [k for k in names if index < len(CANDIDATES[k])]
        launch.TABLES.update({k: {(80, 2): CANDIDATES[k][index]} for k in names})
    found = []
    for kernel in names:
        row = launch.launch(kernel, torch.device("cuda"), torch.bfloat16)
        found.append(
            {"kernel": kernel, "now": index is None, **row.blocks, "warps": row.num_warps, "stages": row.num_stages}
        )
    try:
        with open(lock, "w") as file:
            # The first call compiles and runs under a shared lock, so that it does not disturb a process that measures.
            fcntl.flock(file, fcntl.LOCK_SH)
            torch.manual_seed(0)
            run, watch = WORK[prefix](), _Stopwatch()
            run()
            fcntl.flock(file, fcntl.LOCK_EX)
            samples: dict[str, list[float]] = {kernel: [] for kernel in names}
            for _ in range(ROUNDS):
                watch.launches.clear()
                run()
                for kernel in names:
                    samples[kernel].append(watch.milliseconds(kernel))
        for each in found:
            values = samples[each["kernel"]][1:]
            each |= {"median_ms": statistics.median(values), "least_ms": min(values)}
    except Exception as error:
        for each in found:
            each["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return found


def screen(kernels_: list[str], arch: int) -> None:
    """Compiles every candidate for ``arch`` and prints its registers, spills and shared memory."""
    import compile_report

    for spec in launch.registered_kernels():
        name = spec.kernel.__name__  # type: ignore[attr-defined]
        if name not in kernels_ or spec.dtype != torch.bfloat16:
            continue
        for row in CANDIDATES[name]:
            launch.TABLES[name] = {(80, 2): row}
            try:
                made = compile_report.compile_kernel(spec, arch)
                found = f"{made.registers} registers, {made.spills} spills, {made.shared_bytes >> 10} KiB"
            except Exception as error:
                found = str(error).splitlines()[0][:100]
            print(spec.name, dict(row.blocks), row.num_warps, row.num_stages, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=list(CANDIDATES), action="append", help="may be repeated; default: all")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--screen", type=int, choices=launch.ARCHITECTURES, help="compile for it, do not run")
    arguments = parser.parse_args()
    chosen = arguments.kernel or list(CANDIDATES)
    if arguments.screen:
        screen(chosen, arguments.screen)
        return
    with tempfile.NamedTemporaryFile() as lock:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.workers, mp_context=context, max_tasks_per_child=1) as pool:
            jobs = []
            for prefix in WORK:
                most = max((len(CANDIDATES[k]) for k in chosen if k.startswith(prefix)), default=-1)
                for index in (None, *range(most)) if most >= 0 else ():
                    jobs.append(pool.submit(measure, prefix, index, chosen, lock.name))
            for job in jobs:
                for row in job.result():
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
