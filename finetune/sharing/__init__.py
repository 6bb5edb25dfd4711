"""What others get of a run: its adapter with a model card, on the Hugging Face hub. No torch."""
