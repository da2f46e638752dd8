"""What the handler is told, when no loop over timers, members or events is under way; and what its callbacks raise."""
