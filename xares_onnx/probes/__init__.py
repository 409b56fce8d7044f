"""Training of heads on stored embeddings: one module a kind of head, all of one shape.

Each takes arrays, folds of row numbers, the head's settings and seeds, and gives a `HeadResult` for every fold and seed. The
modules of the networks themselves lie in `models`.
"""
