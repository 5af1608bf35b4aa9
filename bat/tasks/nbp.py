"""BirdSet NBP (NIPS4BPlus, France and Spain); see ``bat.tasks.birdset``."""

from bat.tasks.birdset import birdset

TASK = birdset("NBP")
