"""The parts of ``judge.py``."""
