"""The measure of trust: many siblings, many tasks, every way of carrying an adapter, and how far its choice may be trusted."""
