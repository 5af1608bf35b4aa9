"""Configuration: the schema, where recipes and fragments lie, and how they are put together."""
