"""Load tests of the whole gateway: a swarm of agents, real servers, scenarios with bounds, and a report of each run."""
