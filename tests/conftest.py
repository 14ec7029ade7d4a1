"""Every run's log ends with the processor: which code torch and its libraries take depends on it."""

from __future__ import annotations

import instruction_sets
import pytest
import torch

from balcaprl.torchvision_compat import ensure_importable


def pytest_configure(config: pytest.Config) -> None:
    """The process that hands tests to others makes their warnings anew, and imports the packages whose classes they have."""
    if getattr(config.option, "numprocesses", None):
        ensure_importable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Not pytest_report_header, which -q leaves out."""
    taken = torch.backends.cpu.get_cpu_capability()
    terminalreporter.write_line(f"{instruction_sets.description()}; torch {torch.__version__} takes {taken}")
