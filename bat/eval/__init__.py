"""Evaluates frozen encoders: features, splits, probes, selection, results."""
