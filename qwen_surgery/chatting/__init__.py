"""Talk to exported nets or to a bmodel: the tokenizer, the prompt format, the conversation."""
