"""Times whole training steps (sample, score, update, sync) of ours and of TRL 1.16's GRPO on equal terms.

python bench/train_step.py                        # all, 112 and 448 px, to bench/results/train_step/<device>.jsonl
python bench/train_step.py --provider ours --pixels 112 --steps 4 --output -

Both sides have the same model, images, rewards and lengths. The model is a random Qwen2.5-VL, so that completions reach
their limit on both sides. Images are noise in PNG files, and each side decodes them itself. The rewards are cheap
formulas of the text. TRL samples with transformers' generate, because its colocated vLLM fails on a CPU build (it calls
``load_weights`` on repacked weights) and its paged generation requires CUDA. TRL runs once with the whole batch and
once with the batch in four accumulated parts; the faster one counts. Ours runs once with vLLM, and once with
transformers (``ours-hf``).

The first steps are warm-up. Each provider runs in its own process. The providers take turns of one step each, because a
machine's speed changes from minute to minute. The time of our step includes everything in its turn, also logging. That
of TRL's step does not include the loading of images, which TRL does before the step begins.
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

from support.workers import append, failure, stamp

SOURCES = ("engine/**/*.py", "kernels/ops/**/*.py", "kernels/csrc/**/*", "bench/train_step.py")
PROVIDERS = ("ours", "ours-hf", "trl", "trl-accumulated")
WARMUP = 2
WAITING = "waiting for its turn"
_CORPUS = ["There are two shapes on a white background. A large solid red circle is at the top left."] * 3


def rewards_of(text: str) -> tuple[float, float, float]:
    """Three cheap rewards in [0, 1] that depend on the length of the text."""
    length = len(text)
    return (length % 97) / 96, (length % 31) / 30, min(1.0, length / 400)


class Turn:
    """A worker's side of taking turns: it computes between two calls of ``next`` while the other workers wait."""

    began = 0.0

    def next(self) -> None:
        """Ends this worker's turn, and returns when its next turn begins."""
        print(WAITING, flush=True)
        sys.stdin.readline()
        self.began = time.perf_counter()


def measure_ours(folder: Path, options: argparse.Namespace, turn: Turn, sampler: str) -> dict[str, Any]:
    """Measures our trainer, with the phases from its own log; returns the row."""
    from balcaprl.config import TrainConfig
    from balcaprl.reporting.metrics import read_jsonl
    from balcaprl.training.trainer import Trainer
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
    trainer.save = lambda: config.output_dir  # type: ignore[method-assign]  # the disk is not measured
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
    """Measures TRL's trainer; returns the row. Sampling and scoring are timed around its own methods, and the rest of a
    step counts as the update."""
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
    """Wraps ``method``: each call adds its seconds to the last of ``times`` and appends the number of sampled tokens to
    ``lengths``, unless that is None."""

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
    """The fields of a row that both sides report."""
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
    """Peak resident memory of this process in bytes; None if the system does not report it."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def prepare(folder: Path, pixels: int, count: int) -> None:
    """Writes the model, ``count`` noise images, and the file of captions into ``folder``."""
    import numpy as np
    from PIL import Image

    from balcaprl.demo.tiny_models import build_tiny_qwen

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
        os._exit(0)  # the row is printed, so a slow interpreter shutdown must not count as a failure
    for pixels in options.pixels or (112, 448):
        with tempfile.TemporaryDirectory(prefix="balcaprl-bench-") as root:
            prepare(Path(root), pixels, options.prompts * (WARMUP + options.steps))
            for provider, found in in_turns(Path(root), options, pixels).items():
                append({"provider": provider, "pixels": pixels, **found}, options.output, "train_step")


def in_turns(root: Path, options: argparse.Namespace, pixels: int) -> dict[str, dict[str, Any]]:
    """Starts a worker for each provider, lets each do one step per round until all are done, and returns their rows."""
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
    """The process of one provider."""

    def __init__(self, command: list[str], errors: Path) -> None:
        """Starts the process, and waits until it is ready for its first step."""
        self._errors = errors
        self.row: dict[str, Any] = {}
        with errors.open("w") as file:
            self._process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=file, text=True)
        self._running = self._wait()

    def take_turn(self) -> bool:
        """Lets the process do a step; returns whether it has another one."""
        if self._running:
            assert self._process.stdin is not None
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            self._running = self._wait()
        return self._running

    def _wait(self) -> bool:
        """Reads the process's output until its turn or the process itself ends; returns whether the process still runs.

        When the process has ended, ``row`` is its result or describes its failure.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(WAITING):
                return True
            if line.startswith('{"'):  # TRL also prints Python dictionaries, which begin with {'
                self.row = json.loads(line)
        if self._process.wait() or not self.row:
            self.row = failure("train_step", self._errors.read_text(), self._process.returncode)
        return False


if __name__ == "__main__":
    main()
