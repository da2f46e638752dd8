"""What deadlines and limits are called when the handler is told of one."""

DEADLINE_ALARM = "alarm"
DEADLINE_PONG = "pong"
LIMIT_BACKLOG = "backlog"
LIMIT_MESSAGES = "messages"
LIMIT_PINGS = "pings"
