"""The exact judge of drawn scenes."""
