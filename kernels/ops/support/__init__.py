"""What all ops use: launch tables, the compiled library, argument checks, testing, Triton helpers."""
