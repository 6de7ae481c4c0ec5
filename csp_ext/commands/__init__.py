"""Commands of ``csp`` with modules of their own, and what all commands share."""
