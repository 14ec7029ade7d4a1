"""How long new weights take to reach a colocated vLLM, and how many copies of them the process holds.

python bench/sync.py                                            # all sizes and ways, to bench/results/sync/<device>.jsonl
python bench/sync.py --size 30m --way shared --way trl --output -

Ways: our strategies ``shared``, ``inplace`` and ``reload`` (vLLM's own reload_weights, repacking included), and ``trl``: a call
of ``load_weights`` per parameter, as TRL 1.16's colocated sync makes them (``sync_weights`` of trl.generation), on
weights that are not repacked, as it fails on others. Each runs in a process of its own, on a random Qwen2.5-VL; between two
syncs every weight changes. Times include dropping the caches and the checks; a first sync, with its probe, is not counted. The
measured bandwidth of a plain copy stands in every row: bytes are counted once read and once written.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

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
    """One way on one model, in this process."""
    import numpy as np
    import torch
    from PIL import Image
    from run import provenance
    from timing import copy_bandwidth

    from balcaprl.config import SamplingConfig
    from balcaprl.policy import Policy
    from balcaprl.rollout.vllm import VLLMRollout
    from balcaprl.types import Sample

    bandwidth = copy_bandwidth(torch.device("cpu"), megabytes=256)
    policy = Policy.from_pretrained(folder, dtype=dtype)
    weight_bytes = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8))
    prompt = policy.prepare(Sample("s", lambda: image, "A circle.", "Describe the image."))
    sampler = VLLMRollout(policy, max_num_seqs=1, sync="inplace" if way == "trl" else way)  # type: ignore[arg-type]
    sampler.generate([prompt], 1, SamplingConfig(max_completion_tokens=4), seed=0)
    seconds, report = [], None
    for version in range(rounds + 1):
        with torch.no_grad():
            torch._foreach_mul_(list(policy.model.parameters()), 1.001)
        started = time.perf_counter()
        report = sync_as_trl(sampler, policy) if way == "trl" else sampler.sync(version + 1)
        seconds.append(time.perf_counter() - started)
    low, median, high = statistics.quantiles(seconds[1:], n=4, method="inclusive")
    moved = report.bytes_copied if report is not None else 0
    resident = psutil.Process().memory_info().rss
    sampler.close()
    return {
        "bench": "sync",
        "way": way,
        "dtype": dtype,
        "num_parameters": policy.num_parameters,
        "num_tensors": report.num_tensors if report is not None else 0,
        "weight_bytes": weight_bytes,
        "bytes_copied": moved,
        "median_ms": 1e3 * median,
        "low_ms": 1e3 * low,
        "high_ms": 1e3 * high,
        "rounds": rounds,
        "copy_bytes_per_second": bandwidth,
        "percent_of_copy_bandwidth": 100 * 2 * moved / median / bandwidth if moved else None,
        "resident_bytes": resident,
        **provenance(torch.device("cpu")),
    }


def sync_as_trl(sampler: Any, policy: Any) -> Any:
    """One call per parameter, then the prefix cache: what TRL does; its other caches are left stale."""
    from balcaprl.types import SyncReport

    parameters = dict(policy.model.named_parameters())
    model = sampler._engine.model
    for name, parameter in parameters.items():
        model.load_weights([(policy.family.published_name(name), parameter.data)])
    sampler._engine._llm.reset_prefix_cache()
    num_bytes = sum(p.numel() * p.element_size() for p in parameters.values())
    return SyncReport("trl", len(parameters), num_bytes, 0.0, 0)


def build(size: str, folder: Path) -> Path:
    """A random model of about that many parameters; its vocabulary is small, so that layers are what counts."""
    from balcaprl.policy.tiny import build_tiny_qwen

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
        os._exit(0)  # the row is out: a slow end of the interpreter must not count as a failure
    with tempfile.TemporaryDirectory(prefix="balcaprl-bench-") as root:
        for size in options.size or SIZES:
            folder = build(size, Path(root))
            for way in options.way or WAYS:
                worker = [sys.executable, __file__, "--worker", str(folder), way]
                worker += ["--dtype", options.dtype, "--rounds", str(options.rounds)]
                emit(worker, {"size": size}, options.output, "sync")


def emit(worker: list[str], more: dict[str, Any], output: Path | None, name: str) -> None:
    """Run a worker, and print and append the row that it prints last; a failure is a row, too."""
    done = subprocess.run(worker, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    failed = {"bench": name, "failed": done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]}
    row = {**more, **(json.loads(lines[-1]) if done.returncode == 0 and lines else failed)}
    print(json.dumps(row), flush=True)
    if output is not None and str(output) == "-":
        return
    from run import RESULTS, cpu_name

    target = output or RESULTS / name / f"{cpu_name().replace(' ', '_').replace('/', '_')}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
