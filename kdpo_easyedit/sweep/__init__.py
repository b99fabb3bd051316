"""Many comparisons from one YAML, here or on a Ray cluster."""
