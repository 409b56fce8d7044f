"""`diagnose`: where a copy of a model departs from its reference, what that costs, and the file that mends it."""
