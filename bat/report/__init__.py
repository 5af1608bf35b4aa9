"""Pictures and, later, the written report of a run."""
