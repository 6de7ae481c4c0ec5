"""What pruning saves in milliseconds and bytes, in whole models: ``csp bench``."""
