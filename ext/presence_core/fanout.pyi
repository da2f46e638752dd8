"""Events of rooms on their way to the members: batches, passes, and rooms that take turns."""
