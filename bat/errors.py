"""Errors of the user's, and how a run ends so that it can go on."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user's: the command line prints it without a traceback and exits 2.

    The message names the offending thing and the remedy.
    """


RESUME_ME = 75
"""Exit code (``EX_TEMPFAIL``) of a run that was ended and saved: the same command continues it."""


class Interrupted(BaseException):
    """The run was ended on request, and can go on; ``str()`` says why. Like ``KeyboardInterrupt``
    it is no ``Exception``, so that nothing on the way takes it for one."""
