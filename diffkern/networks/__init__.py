"""Networks, and the modes in which they are made and run."""
