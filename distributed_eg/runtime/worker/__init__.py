"""What runs in a worker process: the door for requests, the stages behind it, and what they share."""
