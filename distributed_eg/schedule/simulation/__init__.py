"""Random schedules of the order of work under a seeded adversary, checked against what must hold."""
