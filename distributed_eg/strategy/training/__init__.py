"""One expert's training inside a worker: the user's own strategy, packed on the driver and unpacked there."""
