"""The tiny twin: a checkout's own whole model, small enough to run at every export, beside the nets."""
