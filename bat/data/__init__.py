"""Reads shards and audio files, and makes batches of waveforms on the host."""
