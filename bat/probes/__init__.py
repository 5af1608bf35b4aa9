"""Probes: small trained heads on a frozen encoder. Input: features of all blocks; output: logits.

A probe is a class in a file of this folder, listed in that file's ``PROBES``; ``base.build_probe``
finds it by its name there, or by a dotted import path for a probe defined elsewhere.
"""
