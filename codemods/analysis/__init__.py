"""What the rules must know about a file before they may change it."""
