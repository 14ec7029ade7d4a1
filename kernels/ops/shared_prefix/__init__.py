"""Attention of a group's completions to their shared prompt."""
