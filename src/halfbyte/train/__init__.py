"""A run: composed, looped, evaluated, saved, resumed."""
