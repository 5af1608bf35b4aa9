"""BirdSet NES (coffee farms, Colombia and Costa Rica); see ``bat.tasks.birdset``."""

from bat.tasks.birdset import birdset

TASK = birdset("NES")
