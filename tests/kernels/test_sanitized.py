"""No access out of bounds, no undefined behaviour: the native library built with the address and the undefined-behaviour
sanitizer, and run over odd sizes with every instruction set, in a process that loads the sanitizer first."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"

# Tensors have exactly the size that the sizes ask for: whatever is read or written behind them is in a guarded zone.
PREAMBLE = """
import itertools, sys
from pathlib import Path
import torch
import balcaprl.kernels as kernels
from balcaprl.kernels.layers import native as native_layers
from balcaprl.kernels.support import native
native._LIBRARY_PATH = Path(sys.argv[1])
library = native.library()
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
def rand(*shape, dtype=torch.float32):
    return torch.rand(*shape, generator=generator).to(dtype)
"""
ALL_OPS = """
def ragged(num_tokens):
    first = num_tokens // 3
    offsets = torch.tensor([0, first, first, num_tokens], dtype=torch.int32)
    arguments = {"advantages": torch.tensor([1.0, 0.0, -1.0]), "cu_seqlens": offsets, "reduction": "sequence-mean"}
    if num_tokens % 2:
        extra = {name: -rand(num_tokens) for name in ("sampling_logprobs", "reference_logprobs")}
        return {"old_logprobs": -rand(num_tokens), **arguments, **extra, "sampling_ratio_cap": 2.0, "kl_coef": 0.1}
    return {"old_logprobs": None, **arguments}

def losses():
    for num_tokens in (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 8191, 8193, 16385):
        logprobs = (-rand(num_tokens)).requires_grad_()
        kernels.policy_loss(logprobs, **ragged(num_tokens), impl="native").loss.backward()

def advantages():
    sizes = ((1, 1, 1), (1, 2, 1), (3, 5, 2), (7, 8, 3), (9, 3, 5), (700, 8, 3), (2, 3001, 1), (30011, 3, 1))
    for (groups, size, rewards), dtype in itertools.product(sizes, (torch.float32, torch.float64)):
        scores = rand(groups * size, rewards, dtype=dtype)
        scores[scores < 0.1] = torch.nan
        mask = {"lengths": rand(groups * size), "reference_lengths": rand(groups * size) + 0.5, "masked_reward": -1}
        for method, extra in itertools.product(("c-gdpo", "gdpo", "grpo"), ({}, mask)):
            weights = [0.5] * rewards if extra else None
            kernels.grouped_advantages(scores, size, weights=weights, method=method, **extra, impl="native")

def heads():
    sizes = ((1, 1, 1), (2, 3, 17), (5, 7, 63), (9, 5, 129), (17, 8, 1025), (33, 16, 4099))
    for (tokens, dims, vocabulary), dtype in itertools.product(sizes, (torch.float32, torch.bfloat16, torch.float16)):
        targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
        logits = (8 * rand(tokens, vocabulary)).to(dtype).requires_grad_()
        for inplace in (False, True):
            held = logits * 1.0
            loss = kernels.logits_policy_loss(held, targets, **ragged(tokens), inplace_grad=inplace, impl="native").loss
            loss.backward()
        hidden, weight = (rand(n, dims).to(dtype).requires_grad_() for n in (tokens, vocabulary))
        kernels.linear_logprobs(hidden, weight, targets, impl="native").logprobs.sum().backward()
        for filter_eps in (None, 1e-3):
            arguments = {**ragged(tokens), "filter_eps": filter_eps, "impl": "native"}
            kernels.linear_policy_loss(hidden, weight, targets, **arguments).loss.backward()

def layers():
    for rows, size in ((1, 1), (2, 3), (3, 15), (5, 17), (65, 63), (64, 130), (129, 1025)):
        x, gate, up = (rand(rows, size).requires_grad_() for _ in range(3))
        native_layers.rms_norm(x, rand(size).requires_grad_(), 1e-6).sum().backward()
        native_layers.silu_mul(gate, up).sum().backward()
        native_layers.rotate(rand(rows, 3, 2 * size).requires_grad_(), *rand(2, rows, 2 * size)).sum().backward()

for level in range(3):
    library.balcaprl_set_simd_level(level)
    layers()
    losses()
    advantages()
    heads()
print("all ops ran")
"""
# A caller that lies about a size: the sanitizer must see it, or this test shows nothing.
TOO_SHORT = """
short, gradients, sums = torch.empty(1000), torch.empty(1001), torch.empty(7, dtype=torch.float64)
inputs, outputs = [short.data_ptr()] * 4, (gradients.data_ptr(), sums.data_ptr())
library.balcaprl_token_loss(1001, *inputs, None, None, 0.2, 0.2, 0.0, 0.0, *outputs)
"""


def runtime(name: str) -> str | None:
    """Path of one of the compiler's runtime libraries, or None where it has none."""
    compiler = shutil.which("g++")
    if compiler is None or not shutil.which("cmake"):
        return None
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    return path if os.path.isabs(path) else None


pytestmark = [
    pytest.mark.toolchain,
    pytest.mark.skipif(
        not sys.platform.startswith("linux") or runtime("libasan.so") is None,
        reason="needs Linux, cmake, and a g++ that comes with the address sanitizer",
    ),
]


@pytest.fixture(scope="module")
def sanitized_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_CXX_COMPILER=g++", f"-DCMAKE_CXX_FLAGS={FLAGS}"]
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout
    return folder / "libbalcaprl_native.so"


def run(script: str, library: Path) -> tuple[int, str]:
    """Runs it with the sanitizer loaded before all else; the C++ runtime too, whose exceptions the sanitizer wraps."""
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + script, str(library)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    return done.returncode, done.stdout


def test_no_op_leaves_its_memory_or_does_what_is_undefined(sanitized_library: Path) -> None:
    status, output = run(ALL_OPS, sanitized_library)
    assert status == 0, output[-6000:]
    assert output.endswith("all ops ran\n")


def test_the_sanitizer_would_see_it(sanitized_library: Path) -> None:
    status, output = run(TOO_SHORT, sanitized_library)
    assert status != 0
    assert "AddressSanitizer: heap-buffer-overflow" in output
