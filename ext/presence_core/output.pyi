"""What a connection is sent: at once, or from its backlog when the socket takes more."""
