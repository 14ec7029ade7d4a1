"""Whole training steps (sample, score, update, sync): ours and TRL 1.16's GRPO, same model, images, rewards and lengths.

python bench/train_step.py                              # both, 112 and 448 px, to bench/results/train_step/<device>.jsonl
python bench/train_step.py --provider ours --pixels 112 --steps 4 --output -

The model is a random Qwen2.5-VL, so that completions reach their limit on both sides; images are noise in PNG files, decoded
by either side itself; the rewards are cheap formulas of the text. TRL samples with transformers' generate: its colocated vLLM
fails on a CPU build (it calls ``load_weights`` on repacked weights), and its paged generation wants CUDA. Its batch is taken
whole and in four accumulated parts; the faster counts. The first steps are warm-up. Each provider runs in a process of its own;
they take turns, a step each, as a machine's speed wanders from minute to minute. A step of ours lasts a whole turn, logging
included; of TRL's, the loading of images, which comes before its own begins, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

from sync import append, failure, stamp

SOURCES = ("engine/**/*.py", "kernels/ops/*.py", "kernels/csrc/**/*", "bench/train_step.py")
PROVIDERS = ("ours", "ours-hf", "trl", "trl-accumulated")
WARMUP = 2
WAITING = "waiting for its turn"
_CORPUS = ["There are two shapes on a white background. A large solid red circle is at the top left."] * 3


def rewards_of(text: str) -> tuple[float, float, float]:
    """Three cheap rewards in [0, 1] that differ from text to text."""
    length = len(text)
    return (length % 97) / 96, (length % 31) / 30, min(1.0, length / 400)


class Turn:
    """A worker's own: it computes between two calls of ``next``, and the others wait."""

    began = 0.0

    def next(self) -> None:
        """Give the turn away, and return when it comes round again."""
        print(WAITING, flush=True)
        sys.stdin.readline()
        self.began = time.perf_counter()


def measure_ours(folder: Path, options: argparse.Namespace, turn: Turn, sampler: str) -> dict[str, Any]:
    """Our trainer; phases as its own log tells them."""
    from balcaprl.config import TrainConfig
    from balcaprl.metrics import read_jsonl
    from balcaprl.trainer import Trainer
    from balcaprl.types import RewardBreakdown

    class FormulaJudge:
        name = "formula"

        def score(self, sample: Any, captions: Any) -> list[RewardBreakdown]:
            return [RewardBreakdown(*rewards_of(caption)) for caption in captions]

    config = TrainConfig.model_validate(
        {
            "output_dir": str(folder / f"run-{sampler}"),
            "steps": WARMUP + options.steps,
            "model": {"path": str(folder / "model"), "device": options.device},
            "data": {"kind": "jsonl", "path": str(folder / "captions.jsonl"), "num_eval": 0},
            "rollout": {
                "sampler": sampler,
                "prompts_per_step": options.prompts,
                "group_size": options.group_size,
                "sampling": {"max_completion_tokens": options.tokens},
            },
            "reward": {"length_rule": "none"},
            "optim": {"lr": 1e-5},
            "checkpoint": {"every": 0},
            "logging": {"tensorboard": False, "completions": False},
        }
    )
    trainer = Trainer(config, judge=FormulaJudge())
    trainer.save = lambda: config.output_dir  # type: ignore[method-assign]  # the step is measured, not the disk
    seconds: list[float] = []

    def end_step() -> None:
        seconds.append(time.perf_counter() - turn.began)
        turn.next()

    trainer.save_if_due = end_step  # type: ignore[method-assign]
    turn.next()
    try:
        trainer.train()
    finally:
        trainer.close()
    lines = read_jsonl(config.output_dir / "metrics.jsonl")[WARMUP:]
    names = [key for key in lines[0] if key.startswith("time/") and key != "time/step"]
    phases = {name.removeprefix("time/"): statistics.median(line[name] for line in lines) for name in names}
    return {
        "phases_s": phases | {"step": statistics.median(seconds[WARMUP:])},
        "tokens": statistics.fmean(line["tokens"] for line in lines),
        **row(seconds[WARMUP:], options),
    }


def measure_trl(folder: Path, options: argparse.Namespace, turn: Turn, accumulation: int) -> dict[str, Any]:
    """TRL's trainer; sampling and scoring are timed around its own methods, the rest of a step is the update."""
    from balcaprl.torchvision_compat import ensure_importable

    ensure_importable()
    import torch
    from datasets import Dataset, Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    records = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    dataset = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": "Describe the image."}] for _ in records],
            "image": [str(folder / record["image"]) for record in records],
        }
    ).cast_column("image", Image())
    completions = options.prompts * options.group_size
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    config = GRPOConfig(
        output_dir=str(folder / f"trl-{accumulation}"), max_steps=WARMUP + options.steps, learning_rate=1e-5,
        per_device_train_batch_size=completions // accumulation, gradient_accumulation_steps=accumulation,
        num_generations=options.group_size, max_completion_length=options.tokens, temperature=1.0, top_k=0,
        multi_objective_aggregation="normalize_then_sum", beta=0.0, use_cpu=options.device == "cpu", bf16=False,
        gradient_checkpointing=False, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    seconds: list[float] = []
    phases: dict[str, list[float]] = {"sample": [], "score": []}

    class StepClock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turn.next()
            for times in phases.values():
                times.append(0.0)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - turn.began)

    def reward(place: int) -> Any:
        def function(completions: Any, **_: Any) -> list[float]:
            return [rewards_of(completion[0]["content"])[place] for completion in completions]

        return function

    trainer = GRPOTrainer(
        model=model, args=config, train_dataset=dataset, reward_funcs=[reward(place) for place in range(3)],
        processing_class=AutoProcessor.from_pretrained(folder / "model"), callbacks=[StepClock()],
    )  # fmt: skip
    lengths: list[int] = []
    for phase, method in (("sample", "_generate_single_turn"), ("score", "_calculate_rewards")):
        setattr(
            trainer, method, clocked(getattr(trainer, method), phases[phase], lengths if phase == "sample" else None)
        )
    trainer.train()
    middle = {name: statistics.median(times[WARMUP:]) for name, times in phases.items()}
    middle |= {"step": statistics.median(seconds[WARMUP:])}
    middle["update"] = middle["step"] - middle["sample"] - middle["score"]
    return {"phases_s": middle, "tokens": statistics.fmean(lengths[WARMUP:]), **row(seconds[WARMUP:], options)}


def clocked(method: Any, times: list[float], lengths: list[int] | None) -> Any:
    """``method``, its seconds added to the last of ``times``; the number of tokens that it sampled to ``lengths``."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        result = method(*arguments, **keywords)
        if times:
            times[-1] += time.perf_counter() - started
        if lengths is not None:
            lengths.append(sum(len(ids) for ids in (result[0] if isinstance(result, tuple) else result)))
        return result

    return call


def row(seconds: list[float], options: argparse.Namespace) -> dict[str, Any]:
    """What both sides report."""
    import psutil

    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "bench": "train_step",
        "pixels": options.pixels[0],
        "prompts": options.prompts,
        "group_size": options.group_size,
        "max_tokens": options.tokens,
        "median_s": median,
        "low_s": low,
        "high_s": high,
        "steps": len(seconds),
        "completions_per_second": options.prompts * options.group_size / median,
        "peak_resident_bytes": peak_resident_bytes() or psutil.Process().memory_info().rss,
        **stamp(SOURCES, options.device),
    }


def peak_resident_bytes() -> int | None:
    """Of this process, where the system tells."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def prepare(folder: Path, pixels: int, count: int) -> None:
    """The model and as many noise images as are needed."""
    import numpy as np
    from PIL import Image

    from balcaprl.policy.tiny import build_tiny_qwen

    build_tiny_qwen(
        folder / "model", [*_CORPUS, *["Describe the image."] * 2], hidden_size=128, intermediate_size=256, num_layers=4,
        num_heads=4, num_kv_heads=2, vision_hidden_size=64, vision_intermediate_size=128, vision_depth=4, vision_num_heads=4,
        max_pixels=pixels * pixels,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    lines = []
    for index in range(count):
        Image.fromarray(rng.integers(0, 255, (pixels, pixels, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "reference": "A red circle is at the top."}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", action="append", choices=PROVIDERS)
    parser.add_argument("--pixels", action="append", type=int, help="edge of the square images; default: 112 and 448")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=8, help="beyond the warm-up")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="where rows are appended; - prints them only")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "PROVIDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folder, provider = Path(options.worker[0]), options.worker[1]
        if provider.startswith("trl"):
            result = measure_trl(folder, options, Turn(), 4 if provider == "trl-accumulated" else 1)
        else:
            result = measure_ours(folder, options, Turn(), "hf" if provider == "ours-hf" else "vllm")
        print(json.dumps(result), flush=True)
        os._exit(0)  # the row is out: a slow end of the interpreter must not count as a failure
    for pixels in options.pixels or (112, 448):
        with tempfile.TemporaryDirectory(prefix="balcaprl-bench-") as root:
            prepare(Path(root), pixels, options.prompts * (WARMUP + options.steps))
            for provider, found in in_turns(Path(root), options, pixels).items():
                append({"provider": provider, "pixels": pixels, **found}, options.output, "train_step")


def in_turns(root: Path, options: argparse.Namespace, pixels: int) -> dict[str, dict[str, Any]]:
    """Start a worker for each provider, and let them do a step each, round after round; their rows."""
    workers = {}
    for provider in options.provider or PROVIDERS:
        command = [sys.executable, __file__, "--worker", str(root), provider, "--pixels", str(pixels)]
        for name in ("prompts", "group_size", "tokens", "steps", "device"):
            command += [f"--{name}", str(getattr(options, name))]
        workers[provider] = Worker(command, root / f"{provider}.err")
    running = list(workers.values())
    while running:
        running = [worker for worker in running if worker.take_turn()]
    return {provider: worker.row for provider, worker in workers.items()}


class Worker:
    """A provider's process."""

    def __init__(self, command: list[str], errors: Path) -> None:
        """Start it, and wait until it is ready for its first step."""
        self._errors = errors
        self.row: dict[str, Any] = {}
        with errors.open("w") as file:
            self._process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=file, text=True)
        self._running = self._wait()

    def take_turn(self) -> bool:
        """Let it do a step; whether there is one more."""
        if self._running:
            assert self._process.stdin is not None
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            self._running = self._wait()
        return self._running

    def _wait(self) -> bool:
        """Read what it prints until its turn, or it, is over; then its row is there, of a failure, too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(WAITING):
                return True
            if line.startswith('{"'):  # TRL prints dictionaries of Python's
                self.row = json.loads(line)
        if self._process.wait() or not self.row:
            self.row = failure("train_step", self._errors.read_text(), self._process.returncode)
        return False


if __name__ == "__main__":
    main()
