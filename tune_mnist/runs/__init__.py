"""What a run is on disk: its folder, space, history, tables and checkpoints."""
