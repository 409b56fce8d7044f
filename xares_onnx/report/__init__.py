"""Results for people: the terminal today."""
