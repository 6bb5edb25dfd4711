"""What a study concludes: its winner, how sure that is, what to do next, the report."""
