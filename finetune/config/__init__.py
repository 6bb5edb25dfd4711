"""The config of a run: its types, bounds and checks."""
