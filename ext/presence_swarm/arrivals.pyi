"""Bytes that arrive at a link: C only, see arrivals.pxd. It has nothing for Python."""
