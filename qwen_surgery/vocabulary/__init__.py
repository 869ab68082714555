"""Compile nets of the vocabulary (embeddings, lm_head) with few rows, then extend them to all rows."""
