"""Encoders, one file each: the file name is the registration (``base.load_backbone``)."""
