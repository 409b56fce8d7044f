"""A model file to frames with times, in a process that can be killed."""
