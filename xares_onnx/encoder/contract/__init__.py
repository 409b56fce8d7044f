"""What a model takes and gives: declarations, front end, frame law."""
