"""From hidden states and labels to a loss: pure functions."""
