"""Turns what a record says of its image into RGB pixels."""
