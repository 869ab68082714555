"""Getting a checkout from a hub: which files are needed, the hubs' own clients, what is checked."""
