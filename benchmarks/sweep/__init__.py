"""Many adapters to many targets by many methods, on the frame's engines."""
