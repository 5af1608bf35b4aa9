"""Pre-training objectives, one file each. Each is built around an encoder."""
