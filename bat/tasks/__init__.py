"""Tasks, one file each: rows of a data set, labels, and metrics."""
