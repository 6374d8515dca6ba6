"""What watches a run and keeps it."""
