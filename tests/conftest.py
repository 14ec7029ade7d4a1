"""Every run's log ends with the processor: which code torch and its libraries take depends on it."""

from __future__ import annotations

import instruction_sets
import pytest
import torch


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Not pytest_report_header, which -q leaves out."""
    taken = torch.backends.cpu.get_cpu_capability()
    terminalreporter.write_line(f"{instruction_sets.description()}; torch {torch.__version__} takes {taken}")
