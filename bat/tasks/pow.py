"""BirdSet POW (Powdermill Nature Reserve, Pennsylvania); see ``bat.tasks.birdset``."""

from bat.tasks.birdset import birdset

TASK = birdset("POW")
