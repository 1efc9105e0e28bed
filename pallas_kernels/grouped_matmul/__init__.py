"""Products of ragged groups of rows, each with its own packed matrix (experts)."""
