"""Encoders, one file each: the file name is the registration (``base.find_encoder``)."""
