"""A small chat model with trained weights, and everything that made it: texts, tokenizer, training script."""
