"""A WebSocket presence gateway for online classrooms."""
