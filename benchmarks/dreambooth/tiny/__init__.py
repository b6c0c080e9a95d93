"""The tiny preset's models and images, made on the spot."""
