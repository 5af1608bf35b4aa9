"""Runs a script of this folder in an environment of its own, which is removed afterwards.

The environment holds bat from this checkout and the named packages, as pip resolves them together.
uv must be on the path; a few GB, shared with uv's cache where that lies on the same disk.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def trial(script: str, *packages: str, alone: tuple[str, ...] = ()) -> int:
    """Runs ``script --inside`` there, prints the last line it prints, all where it fails, and
    returns its exit code.

    ``packages``: requirements installed with bat. ``alone``: installed without theirs.
    """
    with tempfile.TemporaryDirectory(prefix="bat-trial-") as folder:
        python = f"{folder}/env/bin/python"
        commands = [["uv", "venv", "--quiet", "--python", "3.11", f"{folder}/env"]]
        install = ["uv", "pip", "install", "--quiet", "--python", python]
        commands += [[*install, str(REPOSITORY), *torch_pins(), *packages]]
        if alone:
            commands += [[*install, "--no-deps", *alone]]
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{' '.join(packages + alone)}: not installed: {done.stderr.strip()}")
                return 1
        # -P: a script has the name of the package it tries
        command = [python, "-P", script, "--inside"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        failed = done.returncode != 0
        print(done.stdout + done.stderr if failed else done.stdout.splitlines()[-1])
        return done.returncode


def torch_pins() -> list[str]:
    """Returns constraints.txt's versions of torch and torchaudio: torchaudio 2.11.1 is built for a
    later torch than 2.11 and does not load beside it."""
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line.split(" ")[0] for line in lines if line.startswith(("torch==", "torchaudio=="))]


def main(script: str, *packages: str, alone: tuple[str, ...] = ()) -> None:
    """Ends the program with ``trial``'s exit code."""
    sys.exit(trial(str(Path(script).resolve()), *packages, alone=alone))
