"""Parts of ``tools/bench.py``: each has ``ABOUT`` and a generator ``run(*, repeats, quick)``."""
