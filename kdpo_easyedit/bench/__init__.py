"""The bench: data, measuring and protocols."""
