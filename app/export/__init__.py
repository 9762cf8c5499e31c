"""Detection + source -> files."""
