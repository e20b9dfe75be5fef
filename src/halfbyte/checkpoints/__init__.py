"""Models, adapters and checkpoints on disk: one file a layout, load and save each."""
