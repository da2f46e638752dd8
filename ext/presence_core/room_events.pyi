"""The events that wait in a room, in order. Owns a reference to each frame and to whom it names. Knows nothing of rooms."""
