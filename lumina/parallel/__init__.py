"""One process flows in; several that agree to the bit on every decision, with the model shared out, flow out."""
