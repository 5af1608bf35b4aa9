"""BirdSet UHH (Hawaii); see ``bat.tasks.birdset``."""

from bat.tasks.birdset import birdset

TASK = birdset("UHH")
