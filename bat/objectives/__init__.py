"""Pre-training objectives, one file each. They are handed a backbone."""
