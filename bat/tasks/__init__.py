"""One file a task: where its rows lie, what its labels are, how it is scored."""
