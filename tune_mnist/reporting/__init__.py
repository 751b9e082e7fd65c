"""What people look at: the report, its charts, the summary."""
