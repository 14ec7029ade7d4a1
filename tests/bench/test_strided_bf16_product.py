"""The script for a report finds a product that reads beside its operand, and only that."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import strided_bf16_product


@pytest.mark.parametrize("columns", [33, 1001])
def test_a_product_that_reads_beside_is_told(monkeypatch, capsys, columns):
    plain = torch.mm

    def mm(first, second):
        if first.dtype != torch.bfloat16 or first.shape[1] != columns or first.is_contiguous():
            return plain(first, second)
        return plain(first, second) + 0.0 * first.as_strided((first.shape[0], 1), (first.stride(0), 1), columns)

    monkeypatch.setattr(torch, "mm", mm)
    assert strided_bf16_product.main() == 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("torch.")]
    assert told == [
        f"torch.bfloat16, (33, {columns}) with a row stride of {columns + 7}: strided {33 * 64} not finite, contiguous right"
    ]


def test_a_right_product_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch, "mm", lambda first, second: (first.float() @ second.float()).to(first.dtype))
    assert strided_bf16_product.main() == 0
    assert capsys.readouterr().out.endswith("all products are right\n")
