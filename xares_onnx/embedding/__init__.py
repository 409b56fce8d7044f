"""Shards to embeddings in the store, and how far two models' embeddings are apart."""
