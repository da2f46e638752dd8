"""The end of a connection: the close handshake from either side, and letting go."""
