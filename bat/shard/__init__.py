"""Makes and checks WebDataset shards."""
