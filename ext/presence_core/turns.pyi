"""One turn of the hub: wait, deadlines, events, rooms, notices; and when the descriptors wake its driver next."""
