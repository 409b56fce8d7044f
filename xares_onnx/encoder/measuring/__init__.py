"""What can be measured of a model: layouts, frame law, windows, layers."""
