"""Measures how long new weights take to reach a colocated vLLM, and how many copies of them the process holds.

python bench/sync.py                                            # all sizes and ways, to bench/results/sync/<device>.jsonl
python bench/sync.py --size 30m --way shared --way trl --output -

The ways are our strategies ``shared``, ``inplace`` and ``reload`` (vLLM's own reload_weights, including repacking), and
``trl``: one call of ``load_weights`` per parameter, as TRL 1.16's colocated sync does (``sync_weights`` of
trl.generation). The way ``trl`` runs on weights that are not repacked, because it fails on repacked ones. Each way runs
in its own process, on a random Qwen2.5-VL. Every weight changes between two syncs, and after the last sync the engine
must serve the policy's weights.

``median_ms`` is the time of the whole sync, including its checks, the dropping of caches, and for ``reload`` the few
tokens that it always generates. ``push_ms`` is the time of the weights only. The first sync, with its probe, is not
counted. A plain copy is timed between the syncs; its bytes count once as read and once as written. ``weight_copies`` is
the memory that trainer and engine hold beyond that of a process that has already run a small engine, divided by the
weights' own bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from support.workers import emit, stamp

SOURCES = ("engine/rollout/**/*.py", "engine/policy/**/*.py", "bench/sync.py")
WAYS = ("shared", "inplace", "reload", "trl")
SIZES: dict[str, dict[str, Any]] = {
    "1m": {"hidden_size": 128, "intermediate_size": 256, "num_layers": 4, "num_heads": 4},
    "30m": {"hidden_size": 512, "intermediate_size": 1408, "num_layers": 9, "num_heads": 8},
    "120m": {"hidden_size": 896, "intermediate_size": 2432, "num_layers": 14, "num_heads": 14},
    "500m": {"hidden_size": 1536, "intermediate_size": 4096, "num_layers": 20, "num_heads": 12},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_layers": 24, "num_heads": 16},
}
_CORPUS = ["A large red circle is above a small blue square.", "Describe the image."] * 3


def measure(folder: Path, way: str, dtype: str, rounds: int) -> dict[str, Any]:
    """Measures one way on one model in this process, and returns the row."""
    import torch

    from balcaprl.policy import Policy

    warm_up(folder.parent)
    plain = torch.ones(64 << 20), torch.zeros(64 << 20)
    before = resident_bytes()
    policy = Policy.from_pretrained(folder, dtype=dtype)
    weight_bytes = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    alone = resident_bytes()
    sampler = start(policy, "inplace" if way == "trl" else way)
    seconds, report = timed_syncs(sampler, policy, way, rounds, plain)
    resident = resident_bytes()
    sampler._engine.drop_caches()
    sampler._probe.verify(rounds + 1)
    sampler.close()
    low, median, high = statistics.quantiles(seconds["sync"], n=4, method="inclusive")
    bandwidth = 2 * 4 * plain[0].numel() / statistics.median(seconds["copy"])
    moved = report.bytes_copied
    return {
        "bench": "sync",
        "way": way,
        "dtype": dtype,
        "num_parameters": policy.num_parameters,
        "num_tensors": report.num_tensors,
        "weight_bytes": weight_bytes,
        "bytes_copied": moved,
        "median_ms": 1e3 * median,
        "low_ms": 1e3 * low,
        "high_ms": 1e3 * high,
        "push_ms": 1e3 * statistics.median(seconds["push"]),
        "rounds": rounds,
        "copy_bytes_per_second": bandwidth,
        "percent_of_copy_bandwidth": 100 * 2 * moved / median / bandwidth if moved else None,
        "resident_before_bytes": before,
        "resident_trainer_bytes": alone,
        "resident_bytes": resident,
        "weight_copies": (resident - before) / weight_bytes,
        **stamp(SOURCES),
    }


def timed_syncs(
    sampler: Any, policy: Any, way: str, rounds: int, plain: tuple[Any, Any]
) -> tuple[dict[str, list[float]], Any]:
    """Runs a sync and a copy of ``plain`` in turn. Returns the seconds of the whole syncs, of only their pushes of
    weights, and of the copies; and the last sync's report."""
    import torch

    seconds: dict[str, list[float]] = {"sync": [], "push": [], "copy": []}
    sampler._strategy.push = clocked(sampler._strategy.push, seconds["push"])
    sync = clocked(sampler.sync, seconds["sync"])
    if way == "trl":
        sync = clocked(lambda version: sync_as_trl(sampler, policy, seconds["push"]), seconds["sync"])
    copy, report = clocked(plain[1].copy_, seconds["copy"]), None
    for version in range(1, rounds + 2):
        with torch.no_grad():
            torch._foreach_mul_(list(policy.model.parameters()), 1.001)
        report = sync(version)
        copy(plain[0])
    return {name: times[1:] for name, times in seconds.items()}, report


def start(policy: Any, strategy: str) -> Any:
    """A sampler with the given sync strategy whose engine is running."""
    import numpy as np
    from PIL import Image

    from balcaprl.config import SamplingConfig
    from balcaprl.rollout.vllm.rollout import VLLMRollout
    from balcaprl.types import Sample

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8))
    prompt = policy.prepare(Sample("s", lambda: image, "A circle.", "Describe the image."))
    sampler = VLLMRollout(policy, max_num_seqs=1, sync=strategy)  # type: ignore[arg-type]
    sampler.generate([prompt], 1, SamplingConfig(max_completion_tokens=4), seed=0)
    return sampler


def warm_up(root: Path) -> None:
    """Runs and closes a small engine, so that vLLM's code and first-use buffers do not count as the weights' memory."""
    from balcaprl.policy import Policy

    folder = root / "1m"
    start(Policy.from_pretrained(folder if folder.is_dir() else build("1m", root)), "shared").close()


def clocked(call: Any, seconds: list[float]) -> Any:
    """Wraps ``call`` so that each call appends its seconds to ``seconds``."""

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = call(*arguments)
        seconds.append(time.perf_counter() - started)
        return result

    return timed


def sync_as_trl(sampler: Any, policy: Any, pushes: list[float]) -> Any:
    """Syncs as TRL does: one call per parameter, then a reset of the prefix cache. vLLM's other caches stay stale."""
    from balcaprl.types import SyncReport

    parameters = {
        policy.family.published_name(policy.model.config, name): p.data for name, p in policy.model.named_parameters()
    }

    def push() -> None:
        for named in parameters.items():
            sampler._engine.model.load_weights([named])

    clocked(push, pushes)()
    sampler._engine._llm.reset_prefix_cache()
    num_bytes = sum(p.numel() * p.element_size() for p in parameters.values())
    return SyncReport("trl", len(parameters), num_bytes, 0.0, 0)


def resident_bytes() -> int:
    """Resident memory of this process in bytes, without the free memory that the allocator keeps."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def build(size: str, folder: Path) -> Path:
    """Builds a random model of about ``size`` parameters. Its vocabulary is small, so most weights are in layers."""
    from balcaprl.demo.tiny_models import build_tiny_qwen

    return build_tiny_qwen(folder / size, _CORPUS, num_kv_heads=2, vision_depth=2, **SIZES[size])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=list(SIZES))
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="where rows are appended; - prints them only")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folder, way = options.worker
        row = measure(Path(folder), way, options.dtype, options.rounds)
        print(json.dumps(row), flush=True)
        os._exit(0)  # the row is printed, so a slow interpreter shutdown must not count as a failure
    with tempfile.TemporaryDirectory(prefix="balcaprl-bench-") as root:
        for size in options.size or SIZES:
            folder = build(size, Path(root))
            for way in options.way or WAYS:
                worker = [sys.executable, __file__, "--worker", str(folder), way]
                worker += ["--dtype", options.dtype, "--rounds", str(options.rounds)]
                emit(worker, {"size": size, "way": way, "dtype": options.dtype}, options.output, "sync")
            if size != "1m":  # every worker warms up on that model
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
