"""Sets up a command's log on stderr and in ``train.log`` of its run folder."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from logging.handlers import MemoryHandler
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only

from bat.errors import FAILED
from bat.redact import RedactingFormatter

NOISE = (
    ".*does not have many workers.*",  # expected on two cores
    ".*no `validation_step`.*",  # pre-training is evaluated by probes, not losses
    ".*in eval mode at the start of training.*",  # the teacher, intended
    ".*treespec, LeafSpec.*",  # Lightning 2.6.6 on torch 2.11
    ".*smaller than the logging interval.*",  # our metrics always log the last step
)
"""Lightning warnings that are not useful to users of bat."""


def is_main() -> bool:
    """Returns True in the first process; works before a Trainer exists."""
    rank = getattr(rank_zero_only, "rank", None)
    if rank is None:  # Lightning is not imported (it takes seconds), or not yet
        names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
        rank = next((int(os.environ[name]) for name in names if os.environ.get(name)), 0)
    return rank == 0


def bar_seconds() -> float:
    """Returns the seconds between two updates of a progress bar: few where somebody watches (a
    terminal, a notebook), many where the lines of a file would pile up."""
    return 0.5 if sys.stderr.isatty() or "ipykernel" in sys.modules else 15.0


class _LogFile(logging.FileHandler):
    """Handler that ignores write errors, so a full disk neither ends a run nor prints errors."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        """Drops the line."""


def log_failure(error: BaseException) -> None:
    """Writes a last line to ``train.log`` alone: the screen shows the error anyway."""
    logger, text = logging.getLogger("bat"), f"{FAILED}{type(error).__name__}: {error}"
    record = logger.makeRecord("bat", logging.ERROR, "", 0, " ".join(text.split()), (), None)
    for handler in logger.handlers:
        if isinstance(handler, _LogFile):
            handler.handle(record)


def start_logging(out: Path | None = None) -> None:
    """Logs to stderr and, given a run, to its ``train.log``; turns Lightning's banners off.

    If called first without the run folder and again with it, the lines logged in between are
    written to ``train.log``.
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
    screen.setFormatter(RedactingFormatter("%(message)s"))
    logger.addHandler(screen)
    if out is not None and is_main():
        out.mkdir(parents=True, exist_ok=True)
        file = _LogFile(out / "train.log", encoding="utf-8")
        file.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
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
