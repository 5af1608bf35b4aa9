"""Shards and the stream: from files to batches of waveforms on the host."""
