"""qwen-surgery: from an upstream Qwen v1 checkout to a verified Sophgo bmodel."""

__version__ = "0.1.0"
