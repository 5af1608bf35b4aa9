"""The toy set of ``bat.data.toy``: 5 kinds of synthetic sound, 2 folds, clips of 2 s, 16 kHz.

On disk it looks like ESC-10 (``audio/`` + ``meta.csv``), so it is read the same way.
"""

from __future__ import annotations

from dataclasses import replace

from bat.tasks import esc50

TASK = replace(esc50.TASK, name="toy", frames=208, classes=5, label_sets=(), statistics="audioset")
