"""What leaves: merged and quantised models that others load."""
