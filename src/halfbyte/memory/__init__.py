"""What a run needs in bytes, and what is decided from it: parts, plan, measure."""
