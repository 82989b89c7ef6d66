"""How good a trained model is: bounds, log p(x), the use of its latents, and the card."""
