"""Whether two checkpoints grew from one initialisation, by their weights alone: what merges and `graft relate` ask."""
