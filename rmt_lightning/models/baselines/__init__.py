"""What memory is compared with."""
