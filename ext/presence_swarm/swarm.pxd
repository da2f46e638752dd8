# The swarm has no C interface: it is driven from Python. What an agent does is declared in life.pxd.
