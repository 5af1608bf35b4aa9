"""Decodes audio, computes spectrograms and augments them.

``decode`` (bytes to mono float32), ``frontend`` (waveform to log-mel, on the device) and
``augment`` (batched, seeded, on the device). Import the modules themselves; this package imports
nothing, so loader workers that only decode do not import torch.
"""
