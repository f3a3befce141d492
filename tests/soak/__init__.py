"""Long trials: `make soak`."""
