"""What a trained model is worth: bounds, log p(x), how it uses its latents, and the card."""
