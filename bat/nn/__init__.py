"""Building blocks: plain keywords in, tensors out. No configuration, no Lightning."""
