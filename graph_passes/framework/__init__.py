"""What runs passes: their base class, the registry, recipes, the runner and its equality check."""
