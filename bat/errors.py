"""User errors and the exception of a resumable shutdown."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake by the user; the command line prints it without a traceback and exits with 2.

    The message names the cause and the remedy.
    """


RESUME_ME = 75
"""Exit code (``EX_TEMPFAIL``) of a run that was ended and saved; the same command resumes it."""

FAILED = "failed: "
"""Begins the last message in ``train.log`` of a run that an error ended."""


class Interrupted(BaseException):
    """Raised when a run was ended on request and can be resumed; ``str()`` gives the reason. Like
    ``KeyboardInterrupt`` it is not an ``Exception``, so ``except Exception`` does not catch it."""
