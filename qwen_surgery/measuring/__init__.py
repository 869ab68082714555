"""Measure a net without a build: how exact it is on the emulated chip, what TPU-MLIR predicts for it."""
