"""From exported (and cleaned) nets to a bmodel, through TPU-MLIR's own tools."""
