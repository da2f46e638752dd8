"""Tens of thousands of agents in one process, for load tests: what they see, and when, is recorded in C."""
