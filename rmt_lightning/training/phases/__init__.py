"""What a run goes through."""
