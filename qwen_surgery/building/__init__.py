"""A build as a graph of tasks that resumes, spreads over machines and cleans up after itself."""
