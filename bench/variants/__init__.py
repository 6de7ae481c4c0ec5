"""Ideas that the package does not have, as methods, and what it takes to compare them with what it has."""
