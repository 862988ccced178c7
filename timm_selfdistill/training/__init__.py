"""Training, from settings to a folder with a trained network."""
