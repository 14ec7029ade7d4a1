"""Advantages of groups: each reward normalised in its group by itself."""
