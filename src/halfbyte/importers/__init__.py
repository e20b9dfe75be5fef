"""Other trainers' settings into recipes: one table a tool, key by key, and a report of what became of each key."""
