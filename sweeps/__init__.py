"""Many runs: studies that search, prune, resume and survive."""
