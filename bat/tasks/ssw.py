"""BirdSet SSW (Sapsucker Woods, New York); see ``bat.tasks.birdset``."""

from bat.tasks.birdset import birdset

TASK = birdset("SSW")
