"""Interfaces to encoders outside training and evaluation."""
