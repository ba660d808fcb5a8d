"""How long things take, and what share of a limit that is."""
