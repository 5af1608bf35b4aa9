"""Probes: small trained readers of a frozen encoder. Features of all blocks in, logits out.

A probe is a class in a file of this folder, listed in that file's ``PROBES``; ``base.build_probe``
finds it by its name there, or by a dotted import path for a probe that lives outside.
"""
