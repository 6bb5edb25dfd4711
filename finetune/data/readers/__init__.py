"""Raw rows of files: `read.py` has the one function that other modules call."""
