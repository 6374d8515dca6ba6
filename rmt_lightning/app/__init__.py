"""What the front doors share. The only room that knows Hydra."""
