"""Figures of the theory: small programs that train and draw in seconds."""
