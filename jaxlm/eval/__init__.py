"""What a trained model is worth: measurements of runs."""
