"""A study: its storage, its workers and its trials."""
