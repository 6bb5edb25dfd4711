"""Trackers: Weights & Biases, TensorBoard, MLflow, Trackio."""
