"""A4A beside training from scratch: what carrying an IP-Adapter to another architecture buys."""
