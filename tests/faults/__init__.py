"""Faults: the kit that makes them (``chaos``), and what must survive them."""
