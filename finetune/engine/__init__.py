"""Engines: what turns batches into weight updates, and what both engines share."""
