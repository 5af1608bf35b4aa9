"""The commands, one file each. torch is not imported before a command starts to work."""
