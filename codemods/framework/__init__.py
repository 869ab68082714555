"""What runs the codemods, finds them and documents them."""
