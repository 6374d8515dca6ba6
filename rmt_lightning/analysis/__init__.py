"""MEASURES, with torch: accuracy against length, attention, retention, FLOPs, perplexity."""
