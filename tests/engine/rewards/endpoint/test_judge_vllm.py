"""The endpoint judge against vLLM's own OpenAI-compatible server, with a tiny random vision-language model.

Slow, for the server alone takes a minute to start: ``pytest -m slow tests/engine/rewards/endpoint/test_judge_vllm.py``.
"""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from balcaprl.config import TrainConfig
from balcaprl.demo.tiny_models import build_tiny_qwen
from balcaprl.reporting.metrics import read_jsonl
from balcaprl.rewards.endpoint.protocol import TASKS

CORPUS = ["There are two shapes on a white background. A large solid red circle is at the top left."] * 3
STARTUP = Path(importlib.util.find_spec("balcaprl").origin).parent / "assets" / "startup"
WAIT_S = 300

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a running vLLM server without ``/v1``."""
    folder = tmp_path_factory.mktemp("judge")
    prompts = [task.prompt for task in TASKS.values() for _ in range(3)]
    build_tiny_qwen(folder / "model", [*CORPUS, *prompts], num_layers=2, vision_depth=2, max_positions=8192)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model"),
        "--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "8192", "--max-num-seqs", "16",
        "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
    ]  # fmt: skip
    paths = [str(STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_up(process, f"http://127.0.0.1:{port}/health", folder / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def wait_until_up(process, url, log):
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail("the server ended: " + log.read_text(errors="replace")[-3000:])
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(1)
    pytest.fail("the server did not come up: " + log.read_text(errors="replace")[-3000:])


def own_counts(server):
    """Requests and tokens as vLLM counts them."""
    with urllib.request.urlopen(f"{server}/metrics", timeout=10) as response:
        text = response.read().decode()
    counts = {}
    for name in ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total"):
        counts[name] = sum(float(v) for v in re.findall(rf"^{name}{{[^}}]*}} ([0-9.e+]+)$", text, re.MULTILINE))
    return counts


@pytest.mark.parametrize("calls", ["separate", "combined"])
def test_two_steps_against_vllm(server, tmp_path, calls):
    """Every reply is valid, images included; tokens equal the server's own counts; three components are there."""
    from balcaprl.training.trainer import Trainer

    policy = build_tiny_qwen(tmp_path / "policy", [*CORPUS, *["Describe the image."] * 2], num_layers=2, vision_depth=2)
    config = TrainConfig.model_validate(
        {
            "output_dir": str(tmp_path / "run"),
            "steps": 2,  # a random judge may tell no captions apart, and ten such steps would end the run
            "model": {"path": str(policy)},
            "data": {"num_eval": 0},
            "rollout": {
                "sampler": "hf", "prompts_per_step": 2, "group_size": 2, "sampling": {"max_completion_tokens": 12},
            },
            "checkpoint": {"every": 0},
            "logging": {"tensorboard": False},
            "reward": {
                "judge": "endpoint",
                # A random model fills every string to its bound, and lists as much as it may.
                "protocol": {"model": "judge", "calls": calls, "max_items": 2, "max_text_chars": 16, "max_reply_tokens": 2048},
            },
            "endpoint": {
                "servers": [{"url": f"{server}/v1", "max_concurrency": 16}], "cache": None, "required_share": 1.0,
                "timeout_s": 300, "patience_s": 300,
            },
        }
    )  # fmt: skip
    before = own_counts(server)
    trainer = Trainer(config)
    try:
        trainer.train()
    finally:
        trainer.close()
    after = own_counts(server)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 2
    total = {name: sum(line[name] for line in lines) for name in lines[0] if name.startswith("judge/")}
    served = after["vllm:request_success_total"] - before["vllm:request_success_total"]
    assert total["judge/attempts"] == total["judge/valid"] == served
    assert total["judge/valid"] >= 8
    assert not any(name.startswith("judge/failed_") for line in lines for name in line)
    for name, own in (("prompt", "prompt"), ("completion", "generation")):
        counted = after[f"vllm:{own}_tokens_total"] - before[f"vllm:{own}_tokens_total"]
        assert total[f"judge/{name}_tokens"] == counted
    assert all(line["num_missing_scores"] == 0 for line in lines)
    for line in read_jsonl(tmp_path / "run" / "completions.jsonl"):
        assert all(0 <= line[name] <= 1 for name in ("precision", "recall", "linguistic"))
