"""The log lines of a command: on stderr and in the ``train.log`` of its run folder."""

from __future__ import annotations

import logging
import warnings
from logging.handlers import MemoryHandler
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from bat.redact import Redacting

NOISE = (
    ".*does not have many workers.*",  # two cores are two cores
    ".*no `validation_step`.*",  # probes, not losses, judge a pre-training run
    ".*in eval mode at the start of training.*",  # the teacher, on purpose
    ".*treespec, LeafSpec.*",  # Lightning 2.6.6 on torch 2.11
    ".*smaller than the logging interval.*",  # our own metrics log the last step in any case
)
"""Warnings of Lightning's that tell our users nothing."""


def is_main() -> bool:
    """Whether this is the first of the processes, before a Trainer is there to ask."""
    return not getattr(rank_zero_only, "rank", 0)


class _LogFile(logging.FileHandler):
    """A log on a full disk is silent: it ends no run, and fills no screen with tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        """Leave the line out."""


def start_logging(out: Path | None = None) -> None:
    """Our own log lines to stderr and, given a run, its ``train.log``; Lightning's banners off.

    Called before the run's folder may be written to, and again with it, it puts what was said in
    between into ``train.log``.
    """
    logger = logging.getLogger("bat")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    said: list[logging.LogRecord] = []
    for handler in list(logger.handlers):
        if isinstance(handler, MemoryHandler):
            said += handler.buffer
        logger.removeHandler(handler)
        handler.close()
    screen = logging.StreamHandler()
    screen.addFilter(Redacting())
    screen.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(screen)
    if out is not None and is_main():
        out.mkdir(parents=True, exist_ok=True)
        file = _LogFile(out / "train.log", encoding="utf-8")
        file.addFilter(Redacting())
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)
        for record in said:
            file.handle(record)
    elif out is None:
        logger.addHandler(MemoryHandler(1_000_000, flushLevel=logging.CRITICAL + 1))
    if not is_main():
        logger.setLevel(logging.WARNING)
    for banner in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(banner).setLevel(logging.ERROR)
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
