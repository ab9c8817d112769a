"""One file per model, each written out from top to bottom."""
