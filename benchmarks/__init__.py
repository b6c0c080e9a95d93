"""Drivers and committed results. Run from a checkout; not part of the installed package."""
