"""What a connection sends: reading, decoding, messages, pings and pongs, close frames, violations, limits."""
