"""Building blocks with plain keyword arguments, independent of configuration and Lightning."""
