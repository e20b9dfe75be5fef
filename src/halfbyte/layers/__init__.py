"""Modules on packed weights: linear layers, the generic decoder layer, attention, the head; and what puts them in place."""
