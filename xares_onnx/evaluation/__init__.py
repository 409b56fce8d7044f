"""The verbs that score: one evaluation, two models side by side, gates, and the record of a result."""
