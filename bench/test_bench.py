"""The registry under pytest-benchmark: ``pytest bench/ --benchmark-only``. Figures are taken with ``run.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# As for `python bench/run.py`: the registry stands beside this file and is no part of the package.
sys.path.insert(0, str(Path(__file__).resolve().parent))
from registry import OPS, check_provider, inputs_for

CPU = torch.device("cpu")
CASES = [
    pytest.param(op, provider, sizes, id="-".join([op.name, provider, *(f"{k}{v}" for k, v in sizes.items())]))
    for op in OPS.values()
    for sizes in op.shapes
    for provider in op.providers
]


@pytest.mark.parametrize(("op", "provider", "sizes"), CASES)
def test_op(benchmark, op, provider, sizes) -> None:
    check_provider(op, provider, sizes, CPU)
    inputs = inputs_for(op, sizes, CPU)
    gradients = [inputs[name] for name in op.differentiable]
    function = op.providers[provider]

    def call() -> None:
        output = function(inputs, sizes)
        if gradients:
            torch.autograd.grad(output.sum(), gradients)

    benchmark.group = f"{op.name} {sizes}"
    benchmark(call)
