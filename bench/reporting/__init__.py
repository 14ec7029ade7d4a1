"""The parts of ``report.py``: the tables, goals and plots of each measurement."""
