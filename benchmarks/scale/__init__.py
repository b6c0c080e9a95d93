"""Data-free transfers on checkpoints of real shapes: throughput beside a plain read, peak memory beside the largest tensor."""
