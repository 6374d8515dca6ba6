"""Where text meets tensors."""
