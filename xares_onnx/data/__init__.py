"""What is scored: task files and their targets, and the clips in their shards."""
