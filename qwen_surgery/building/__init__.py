"""The whole road as a graph of tasks that resumes, spreads and cleans up after itself."""
