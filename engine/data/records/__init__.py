"""Reads data files into records."""
