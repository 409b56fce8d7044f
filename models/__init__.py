"""The arithmetic of the heads: solvers, CTC, the text tower, the adapter of the language model."""
