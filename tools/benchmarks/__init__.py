"""The parts of ``tools/bench.py``: each has ``ABOUT`` and ``run(*, repeats, quick)`` yielding rows."""
