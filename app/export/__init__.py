"""Result files: the registry of outputs and their writers."""
