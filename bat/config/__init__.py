"""Configuration: the schema, the search for recipes and fragments, and their composition."""
