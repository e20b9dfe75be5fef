"""Checks of the data before the first step: each with an id, a sentence and a fix."""
