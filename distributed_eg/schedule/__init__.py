"""The order of work: a synchronous machine, events in, instructions out; no clock, no I/O, no torch."""
