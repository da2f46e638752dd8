"""What is due: pings, missing pongs, alarms, the end of close handshakes."""
