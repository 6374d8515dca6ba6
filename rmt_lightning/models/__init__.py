"""TENSORS: how it is remembered. Nothing in this package knows a task."""
