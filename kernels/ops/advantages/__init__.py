"""Advantages of groups of rollouts, from rewards that are normalised within each group."""
