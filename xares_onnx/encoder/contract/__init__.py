"""What a model takes and gives: what is declared, its front end, its frame law."""
