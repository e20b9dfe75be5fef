"""Flat buffers, AdamW, schedules, loss scaling."""
