"""Models: the two real ones of the demo (pyfuse.models.zoo)."""
