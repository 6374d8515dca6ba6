"""TEXT: what must be remembered. Nothing in this package knows a model."""
