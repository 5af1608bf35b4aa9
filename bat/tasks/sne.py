"""BirdSet SNE (Sierra Nevada, California); see ``bat.tasks.birdset``."""

from bat.tasks.birdset import birdset

TASK = birdset("SNE")
