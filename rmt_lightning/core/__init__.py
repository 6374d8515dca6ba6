"""What every room may import: the one error that is told to users, files, the run folder."""
