"""Training a compressed model on, and keeping its weights."""
