"""What ``run.py``, ``test_bench.py`` and ``tune.py`` measure: ops, cases, providers, and the timing protocol."""
