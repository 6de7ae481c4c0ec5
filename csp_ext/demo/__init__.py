"""What the command line shows: one prompt over the full and over pruned caches, as a table and a picture."""
