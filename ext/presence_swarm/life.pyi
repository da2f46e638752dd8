"""One agent's life at the client's end: C only, see life.pxd. It has nothing for Python."""
