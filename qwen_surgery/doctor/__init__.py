"""Will it work here: what this machine has, what a checkout's build takes, and how to mend what will fail."""
