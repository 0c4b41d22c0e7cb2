"""The face that Avalanche's users know: the model, the strategy, the metrics."""
