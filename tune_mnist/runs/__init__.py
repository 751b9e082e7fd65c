"""What a run leaves on disk: paths, tables, pictures."""
