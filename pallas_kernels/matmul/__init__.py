"""Weight-only products: float activations times a packed matrix."""
