"""Durations counted in fixed buckets from 0.5 ms to 5 s; nothing of it is for Python, `Hub.stats` reads it."""
