"""Rows: read, formatted, split, tokenised."""
