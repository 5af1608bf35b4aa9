"""BirdSet PER (southwestern Amazon basin, Peru); see ``bat.tasks.birdset``."""

from bat.tasks.birdset import birdset

TASK = birdset("PER")
