"""Run folders in; tables, figures and pages out. Without torch."""
