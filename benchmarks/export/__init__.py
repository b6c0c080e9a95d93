"""What exporting and merging cost, beside a plain read of the same bytes and beside PEFT's own way."""
